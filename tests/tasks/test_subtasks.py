import math

import pytest
import torch

from mole.checkpoints import train_population
from mole.config import SubtaskConfig, TaskConfig
from mole.errors import MoleError
from mole.tasks import Classification, labelled, load_task
from mole.tasks.subtasks import Subtasks, draw


def subtask(*, names: list[int], angle: float = 0.0, seen: list[bool] | None = None) -> Subtasks:
    shown = torch.tensor([seen or [True] * 9])
    return Subtasks(torch.tensor([names]), torch.tensor([angle]), shown)


def test_labels_are_renamed_and_left_out_by_hand() -> None:
    found = subtask(names=[2, -1, 0]).labels(torch.tensor([0, 1, 2, 0]))
    assert found.tolist() == [[2, -1, 0, 2]]


def test_a_quarter_turn_and_blank_pixels_by_hand() -> None:
    image = torch.arange(9.0)[None]
    turned = subtask(names=[0], angle=math.pi / 2).images(image)[0, 0].reshape(3, 3)
    torch.testing.assert_close(turned, image.reshape(3, 3).rot90(1), rtol=0, atol=1e-5)
    seen = [True, False] * 4 + [True]
    assert subtask(names=[0], seen=seen).images(image)[0, 0].tolist() == [0, 0, 2, 0, 4, 0, 6, 0, 8]
    assert torch.equal(subtask(names=[0]).images(image)[0], image)  # nothing is interpolated where nothing turns


def test_a_subtask_depends_on_its_seed_alone_and_keeps_to_its_limits() -> None:
    config = SubtaskConfig(labels=[3, 5], rename=True, rotate=90, pixels=0.5)
    many = draw(config, range(200), classes=10, numbers=64)
    one = draw(config, [7], classes=10, numbers=64)
    assert all(torch.equal(a[7], b[0]) for a, b in zip(many, one, strict=True))
    there = many.names >= 0
    assert set(there.sum(1).tolist()) == {3, 4, 5} and 30 < float(many.angles.abs().max().rad2deg()) <= 90
    assert int(many.seen.sum(1).min()) >= 32 and int(many.seen.sum(1).max()) == 64
    for names in many.names:
        assert len(set(names[names >= 0].tolist())) == int((names >= 0).sum())  # no name twice
    assert bool((many.names[there] != torch.arange(10).expand(200, -1)[there]).any())
    plain = draw(SubtaskConfig(labels=[2, 2]), [1], classes=10, numbers=60)
    kept = plain.names[0][plain.names[0] >= 0]
    assert torch.equal(kept, (plain.names[0] >= 0).nonzero()[:, 0])  # not renamed


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MoleError, match=r"task\.subtasks\.labels is \[3, 11\]; legal is at most 10"):
        draw(SubtaskConfig(labels=[3, 11]), [0], classes=10, numbers=64)
    with pytest.raises(MoleError, match="rows of 13 numbers are no square images"):
        draw(SubtaskConfig(rotate=10), [0], classes=3, numbers=13)
    for values in ({"labels": [5, 3]}, {"labels": [1, 3]}, {"rotate": 200}, {"pixels": 0.0}):
        with pytest.raises(ValueError, match=r"labels|rotate|pixels"):
            SubtaskConfig.model_validate(values)
    with pytest.raises(ValueError, match="subtasks choose labels by themselves"):
        TaskConfig(name="digits", labels=[0, 1], subtasks=SubtaskConfig(rename=True))


@pytest.fixture(scope="module")
def task() -> Classification:
    config = TaskConfig(name="digits", steps=150, subtasks=SubtaskConfig(labels=[3, 6], rename=True, rotate=30))
    found = load_task(config)
    assert isinstance(found, Classification)
    return found


def test_networks_learn_their_own_subtask_and_no_other(task: Classification) -> None:
    seeds = [3, 4, 5, 6]
    weights = train_population(task, seeds, [150]).weights
    own, others = task.measure(weights, "test", seeds), task.measure(weights, "test", seeds[1:] + seeds[:1])
    assert own["accuracy"].min() > 0.85 and others["accuracy"].mean() < 0.5
    with pytest.raises(MoleError, match="needs the runs' seeds"):
        task.measure(weights, "test")


def test_support_sets_are_training_images_of_the_labels_that_are_there(task: Classification) -> None:
    images, labels = task.support([3, 4], 40, torch.Generator().manual_seed(0))
    assert images.shape == (2, 40, 64) and bool((labels >= 0).all())
    for row, seed in enumerate((3, 4)):
        names = task.subtasks([seed]).names[0]
        assert set(labels[row].tolist()) <= set(names[names >= 0].tolist())


def test_the_gradient_is_that_of_the_loss(task: Classification) -> None:
    images, labels = task.support([3, 4], 16, torch.Generator().manual_seed(0))
    flat = task.initial([1, 2])
    gradient = task.gradient(flat, images, labels)
    for row in range(2):
        network = task.architecture.build(row + 1)
        torch.nn.functional.cross_entropy(network(images[row]), labels[row]).backward()
        slopes = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
        torch.testing.assert_close(gradient[row], task.spec.flatten(slopes), rtol=1e-4, atol=1e-6)


def test_networks_are_compared_on_what_their_runs_see() -> None:
    """The gap between losses is that of the images and labels of each run's own sub-task."""
    config = TaskConfig(name="digits", subtasks=SubtaskConfig(labels=[3, 5], rename=True, rotate=90, pixels=0.5))
    task = labelled(load_task(config))
    seeds, (one, other) = [5, 6, 7], task.initial([1, 2, 3, 4, 5, 6]).split(3)
    found = task.compare(one, other, 32, torch.Generator().manual_seed(0), seeds)
    index = torch.randint(len(task.train), (3, 32), generator=torch.Generator().manual_seed(0))
    images, labels = task.shown(task.train.images[index], task.train.labels[index], seeds)
    losses = [task.judge(flat, images, labels)["loss"] for flat in (one, other)]
    assert float(found.gap) == pytest.approx(float((losses[0] - losses[1]).abs().mean()), abs=1e-6)
