import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mole.config import TaskConfig
from mole.errors import CorruptFileError, MoleError
from mole.tasks import Task, load_task, openml
from mole.tasks.task import build_network


def test_the_three_splits_of_digits_share_no_image_and_are_balanced(digits: Task) -> None:
    assert [len(s) for s in (digits.train, digits.prompt, digits.test)] == [1200, 300, 297]
    for split in (digits.train, digits.prompt, digits.test):
        assert split.labels.bincount().min() >= 0.94 * len(split) / 10
        assert split.images.min() >= 0 and split.images.max() <= 1
    again = load_task(digits.config)
    assert torch.equal(again.test.images, digits.test.images)
    from sklearn.datasets import load_digits

    rows = np.concatenate([s.images.numpy() for s in (digits.train, digits.prompt, digits.test)])
    everything = (load_digits().data / 16).astype(np.float32)
    assert np.array_equal(rows[np.lexsort(rows.T)], everything[np.lexsort(everything.T)])


def test_measuring_a_population_equals_measuring_each_network(digits: Task) -> None:
    flat = digits.initial([3, 4, 5])
    found = digits.measure(flat, digits.test, numbers_at_once=10_000)
    for row, seed in enumerate([3, 4, 5]):
        network = build_network(digits.layers, seed)
        logits = network(digits.test.images)
        assert found.loss[row].item() == pytest.approx(F.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)
        correct = (logits.argmax(-1) == digits.test.labels).float().mean().item()
        assert found.accuracy[row].item() == pytest.approx(correct, abs=1e-6)


def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_state(digits: Task) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = digits.initial([1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[1], digits.initial([2])[0])
    assert not torch.equal(first[0], first[1])


def write_npz(path: Path, size: int = 2500, pixels: int = 28) -> None:
    images = np.zeros((size, pixels, pixels), np.uint8)
    labels = np.arange(size, dtype=np.uint8) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def test_npz_files_come_from_mole_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_DATA", str(tmp_path))
    write_npz(tmp_path / "mnist.npz")
    task = load_task(TaskConfig(name="mnist", hidden=10))
    assert [len(s) for s in (task.train, task.prompt, task.test)] == [500, 2000, 2500]
    assert task.spec.size == 7960


def test_bad_npz_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_DATA", str(tmp_path))
    config, path = TaskConfig(name="mnist"), tmp_path / "mnist.npz"
    write_npz(path, pixels=27)
    with pytest.raises(CorruptFileError, match=r"mnist\.npz: found images \(2500, 27, 27\)"):
        load_task(config)
    write_npz(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match=r"mnist\.npz: not an archive"):
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

    class Bunch:
        data = np.zeros((70000, 784), np.uint8)
        target = np.array(["3"] * 70000)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: Bunch())
    task = openml.load(TaskConfig(name="mnist"))
    assert [len(s) for s in (task.train, task.prompt, task.test)] == [58000, 2000, 10000]


@pytest.mark.skipif(
    not (Path(os.environ.get("MOLE_DATA", "/nowhere")) / "mnist.npz").exists(),
    reason="needs mnist.npz in the folder MOLE_DATA",
)
def test_networks_learn_the_real_mnist() -> None:
    from mole.checkpoints import train_population

    task = load_task(TaskConfig(name="mnist", hidden=10, learning_rate=0.01, batch_size=128, steps=150))
    assert [len(s) for s in (task.train, task.prompt, task.test)] == [58000, 2000, 10000]
    weights = train_population(task, range(8), [0, 150])
    accuracy = task.measure(weights.flatten(0, 1), task.test).accuracy.reshape(8, 2)
    assert accuracy[:, 0].mean() < 0.25
    assert accuracy[:, 1].mean() > 0.85
