import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mole.config import TaskConfig
from mole.config.sections import TaskName
from mole.errors import CorruptFileError, MoleError
from mole.tasks import Architecture, Classification, archives, load_task, supervised
from mole.tasks.batched import singly
from mole.tasks.supervised import DataOrder, Split, cross_entropy

from .conformance import check_task

DATA = Path(os.environ.get("MOLE_DATA", "/nowhere"))


def write_npz(path: Path, size: int = 2500, shape: tuple[int, ...] = (28, 28)) -> None:
    images = np.random.default_rng(0).integers(0, 256, (size, *shape), np.uint8)
    labels = np.arange(size, dtype=np.uint8) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


@pytest.mark.parametrize("name", ["digits", "iris", "wine", "breast_cancer"])
def test_tasks_of_scikit_learn_conform(name: TaskName) -> None:
    check_task(load_task(TaskConfig(name=name, steps=2)))


@pytest.mark.parametrize(("name", "parameters"), [("mnist", 7960), ("fashion_mnist", 7960), ("cifar10", 5370)])
def test_tasks_of_archives_conform_with_the_networks_of_gpt(
    name: TaskName, parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLE_DATA", str(tmp_path))
    write_npz(tmp_path / f"{name}.npz", shape=(32, 32, 3) if name == "cifar10" else (28, 28))
    task = load_task(TaskConfig(name=name, batch_size=16, steps=2))
    assert task.spec.size == parameters
    assert task.sizes == {"train_images": 500, "prompt_images": 2000, "test_images": 2500}
    check_task(task)


def test_recipes_are_those_of_gpt() -> None:
    for name, epochs, images in (("mnist", 25, 58_000), ("cifar10", 50, 48_000)):
        config = TaskConfig(name=name)
        assert (config.optimizer, config.learning_rate, config.weight_decay) == ("sgd", 0.1, 5e-4)
        assert (config.schedule, config.batch_size, config.steps) == ("epoch_cosine", 128, epochs * (images // 128))
    config = TaskConfig(name="cartpole")
    assert (config.activation, config.learning_rate, config.steps) == ("selu", 3e-4, 500 * 16)
    assert TaskConfig(name="mnist", steps=7).steps == 7 and TaskConfig().width == 16


def test_the_three_splits_of_digits_share_no_image_and_are_balanced(digits: Classification) -> None:
    assert digits.sizes == {"train_images": 1200, "prompt_images": 300, "test_images": 297}
    for split in (digits.train, digits.prompt, digits.test):
        assert split.labels.bincount().min() >= 0.94 * len(split) / 10
        assert split.images.min() >= 0 and split.images.max() <= 1
    again = load_task(digits.config)
    assert isinstance(again, Classification) and torch.equal(again.test.images, digits.test.images)
    from sklearn.datasets import load_digits

    rows = np.concatenate([s.images.numpy() for s in (digits.train, digits.prompt, digits.test)])
    everything = (load_digits().data / 16).astype(np.float32)
    assert np.array_equal(rows[np.lexsort(rows.T)], everything[np.lexsort(everything.T)])


def test_columns_of_tables_are_normalised_by_the_training_rows() -> None:
    task = load_task(TaskConfig(name="wine"))
    assert isinstance(task, Classification) and sum(task.sizes.values()) == 178
    assert task.train.images.mean(0).abs().max() < 1e-5
    assert (task.train.images.std(0) - 1).abs().max() < 1e-5


def test_measuring_a_population_equals_measuring_each_network(digits: Classification) -> None:
    flat = digits.initial([3, 4, 5])
    found = digits.measure(flat, "test", numbers_at_once=10_000)
    for row, seed in enumerate([3, 4, 5]):
        logits = digits.architecture.build(seed)(digits.test.images)
        assert found["loss"][row].item() == pytest.approx(F.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)
        correct = (logits.argmax(-1) == digits.test.labels).float().mean().item()
        assert found["accuracy"][row].item() == pytest.approx(correct, abs=1e-6)


def test_cross_entropy_equals_that_of_pytorch() -> None:
    logits, labels = torch.randn(4, 7, 5) * 30, torch.randint(5, (4, 7))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(4, 7)
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_every_epoch_visits_each_image_at_most_once(toy: Classification) -> None:
    order, again = DataOrder(toy, 7), DataOrder(toy, 7)
    first, second = order.epoch(), order.epoch()
    assert first.shape == (4, 8) and len(set(first.flatten().tolist())) == 32  # 33 images, batches of 8
    assert torch.equal(first, again.epoch()) and not torch.equal(first, second)
    assert not torch.equal(first, DataOrder(toy, 8).epoch())


def test_a_run_sees_its_own_part_of_the_images(toy: Classification) -> None:
    task = toy.with_config(toy.config.model_copy(update={"data_fraction": 0.5}))
    assert task.images_per_run == 16 and task.steps_per_epoch == 2
    order = DataOrder(task, 7)
    seen = set(order.epoch().flatten().tolist())
    assert len(seen) == 16 and seen == set(order.epoch().flatten().tolist())
    assert seen != set(DataOrder(task, 8).epoch().flatten().tolist())


def test_a_choice_of_labels_leaves_only_their_images_in_every_split(toy: Classification) -> None:
    task = toy.with_config(toy.config.model_copy(update={"labels": [0, 2]}))
    assert task.sizes == {"train_images": 22, "prompt_images": 12, "test_images": 10}
    assert set(task.test.labels.tolist()) == {0, 2} and task.spec == toy.spec
    with pytest.raises(MoleError, match=r"\[7\] are not labels of digits; legal is 0 to 2"):
        toy.with_config(toy.config.model_copy(update={"labels": [0, 7]}))
    with pytest.raises(MoleError, match="only labels"):
        task.with_config(toy.config)


def test_convolutions_are_computed_singly_on_a_cpu_and_as_their_own_modules_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Architecture(kind="convnet", widths=[3, 2, 4, 3]).build(seed=0)
    assert singly(network, torch.device("cpu")) and not singly(network, torch.device("cuda"))
    assert not singly(nn.Linear(2, 2), torch.device("cpu"))
    images = Split(torch.randn(6, 3, 8, 8), torch.arange(6) % 3)
    task = Classification(TaskConfig(width=2, depth=2), images, images, images, classes=3)
    flat = task.initial([1, 2])
    own = torch.stack([images.images, images.images.flip(0)])
    monkeypatch.setattr(supervised, "vmap", None)
    monkeypatch.setattr(supervised, "AT_ONCE", 4)
    with torch.no_grad():
        alone = [task.architecture.build(seed)(batch) for seed, batch in zip([1, 2], own, strict=True)]
    torch.testing.assert_close(task.logits(flat, own, own=True), torch.stack(alone))
    torch.testing.assert_close(task.logits(flat, images.images)[1], alone[1].flip(0))


def test_augmented_images_are_mirrored_and_shifted_by_hand_checked_offsets(toy: Classification) -> None:
    image = torch.arange(1.0, 1 + 3 * 8 * 8).reshape(1, 3, 8, 8).repeat(256, 1, 1, 1)
    order, seen = DataOrder(toy, 0), set()
    for found in order.augment(image):
        matches = [
            (mirrored, down, right)
            for mirrored in (False, True)
            for down in range(-4, 5)
            for right in range(-4, 5)
            if torch.equal(found, shifted(image[0].flip(-1) if mirrored else image[0], down, right))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {m for m, _, _ in seen} == {False, True}
    assert {d for _, d, _ in seen} == {r for _, _, r in seen} == set(range(-4, 4))


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    padded = F.pad(image, [4] * 4)
    return padded[:, 4 + down : 12 + down, 4 + right : 12 + right]


def test_images_of_archives_have_the_mean_and_deviation_of_their_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLE_DATA", str(tmp_path))
    images = np.zeros((2500, 32, 32, 3), np.uint8)
    images[..., 1] = 255
    labels = np.arange(2500, dtype=np.uint8) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    task = load_task(TaskConfig(name="cifar10"))
    assert isinstance(task, Classification)
    found = task.train.images[0, :, 5, 9]
    expected = [-125.3 / 63.0, (255 - 123.0) / 62.1, -113.9 / 66.7]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_bad_npz_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_DATA", str(tmp_path))
    config, path = TaskConfig(name="mnist"), tmp_path / "mnist.npz"
    write_npz(path, shape=(27, 27))
    with pytest.raises(CorruptFileError, match=r"mnist\.npz: found images \(2500, 27, 27\)"):
        load_task(config)
    write_npz(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match=r"mnist\.npz: not an archive of"):
        load_task(config)
    np.savez(path, x_train=np.array([Trap()], dtype=object))
    with pytest.raises(CorruptFileError, match=r"mnist\.npz: not an archive"):
        load_task(config)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code in a file was run",))


def test_without_data_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLE_DATA", raising=False)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", unreachable)
    with pytest.raises(MoleError, match=r"put fashion_mnist\.npz .* and set MOLE_DATA"):
        load_task(TaskConfig(name="fashion_mnist"))


def test_images_from_openml_have_the_same_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLE_DATA", raising=False)
    data = np.zeros((6000, 784), np.uint8)
    bunch = SimpleNamespace(data=data, target=np.array(["3"] * 6000))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: bunch)
    monkeypatch.setitem(archives.ARCHIVES, "mnist", archives.Archive("m", 5000, (28, 28), 2000, (0.0,), (1.0,)))
    task = archives.load(TaskConfig(name="mnist"))
    assert task.sizes == {"train_images": 3000, "prompt_images": 2000, "test_images": 1000}


@pytest.mark.skipif(not (DATA / "mnist.npz").exists(), reason="needs mnist.npz in the folder MOLE_DATA")
def test_networks_learn_the_real_mnist() -> None:
    from mole.checkpoints import train_population

    task = load_task(TaskConfig(name="mnist"))
    assert task.sizes == {"train_images": 58_000, "prompt_images": 2000, "test_images": 10_000}
    weights = train_population(task, range(8), [0, 150]).weights
    accuracy = task.measure(weights, "test")["accuracy"].reshape(8, 2)
    assert accuracy[:, 0].mean() < 0.25
    assert accuracy[:, 1].mean() > 0.85


@pytest.mark.skipif(not (DATA / "cifar10.npz").exists(), reason="needs cifar10.npz in the folder MOLE_DATA")
def test_networks_learn_the_real_cifar10() -> None:
    from mole.checkpoints import train_population

    task = load_task(TaskConfig(name="cifar10"))
    assert task.sizes == {"train_images": 48_000, "prompt_images": 2000, "test_images": 10_000}
    weights = train_population(task, range(2), [0, 60]).weights
    loss = task.measure(weights, "prompt")["loss"].reshape(2, 2)
    assert (loss[:, 1] < loss[:, 0] - 0.1).all()
