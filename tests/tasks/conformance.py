"""What any task must hold; the test of a new task calls `check_task` and is done.

def test_my_task() -> None:
    check_task(load_task(TaskConfig(name="mine", steps=8)))
"""

import copy

import pytest
import torch
from torch.func import functional_call

from mole.checkpoints import train_population
from mole.tasks import SplitName, Task
from mole.tasks.batched import batched

SPLITS: tuple[SplitName, ...] = ("train", "prompt", "test")


def check_task(task: Task, *, steps: int = 2) -> None:
    """Check a whole task whose recipe is short."""
    check_network(task)
    check_metrics(task)
    check_divergence(task)
    check_training(task, steps)
    assert task.sizes and all(size > 0 for size in task.sizes.values())
    other = task.config.model_copy(update={"learning_rate": 0.5})
    assert task.with_config(other).config == other and task.to(torch.device("cpu")).spec == task.spec


def check_divergence(task: Task) -> None:
    """Nothing between networks and themselves, something between others, and a gradient that closes the gap."""
    flat, seeds = task.initial([3, 4]), [3, 4]

    def between(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return task.compare(one, other, 16, torch.Generator().manual_seed(0), seeds).divergence

    assert float(between(flat, flat)) == pytest.approx(0.0, abs=1e-6)
    moved = (flat + 0.3).requires_grad_()
    apart = between(moved, flat)
    (gradient,) = torch.autograd.grad(apart, moved)
    assert apart.item() > 1e-3 and float(between(moved.detach() - 1e-3 * gradient, flat)) < apart.item()
    assert task.with_architecture(task.architecture).spec == task.spec
    check_energy(task)


def check_energy(task: Task) -> None:
    """Two draws are scored best where they are distributed as what comes true: either of two networks."""
    a, b = task.initial([3, 4])
    b = b + 0.3
    truth, one, other = (torch.stack([(a, b)[i >> place & 1] for i in range(8)]) for place in range(3))

    def score(one: torch.Tensor, other: torch.Tensor) -> list[float]:
        return [float(part) for part in task.compare(one, truth, 64, torch.Generator().manual_seed(0), [3] * 8, other)]

    drawn, always = score(one, other), score(a.expand(8, -1), a.expand(8, -1))
    assert drawn[0] < 0.7 * always[0] and (drawn[1] < 0.7 * always[1] or drawn[1] == always[1] == 0)


def check_network(task: Task) -> None:
    """One layout; an initialisation of the seed alone; a fast form that computes the same."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    flat = task.initial([3, 4])
    assert torch.equal(torch.get_rng_state(), before)
    assert flat.shape == (2, task.spec.size) and torch.equal(flat[1], task.initial([4])[0])
    assert not torch.equal(flat[0], flat[1])
    network = task.architecture.build(3)
    assert torch.equal(task.spec.flatten(network.state_dict()), flat[0])
    kept = {name.removeprefix(task.prefix) for name in task.learner(3).state_dict() if name.startswith(task.prefix)}
    assert {entry.name for entry in task.spec.entries} == kept
    shape = {"mlp": (5, task.architecture.widths[0]), "convnet": (5, 3, 32, 32), "policy": (5, 4)}
    images = torch.randn(shape[task.architecture.kind])
    fast = batched(copy.deepcopy(network).eval())
    torch.testing.assert_close(fast(images), network.eval()(images))
    torch.testing.assert_close(functional_call(fast, task.spec.unflatten(flat[0]), (images,)), network(images))


def check_metrics(task: Task) -> None:
    """Every split has a finite loss per network, the same alone and among others, and splits differ."""
    flat = task.initial([3, 4, 5])
    found = [task.measure(flat, split) for split in SPLITS]
    for metrics in found:
        assert "loss" in metrics
        for values in metrics.values():
            assert values.shape == (3,) and bool(values.isfinite().all())
    alone = task.measure(flat[1:2], "prompt")["loss"]
    torch.testing.assert_close(alone, found[1]["loss"][1:2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[1]["loss"], found[2]["loss"])


def check_training(task: Task, steps: int) -> None:
    """A run changes its weights, and depends on its seed alone."""
    together = train_population(task, [1, 2, 3], [0, steps]).regular
    alone = train_population(task, [2], [0, steps]).regular
    assert torch.equal(together[:, 0], task.initial([1, 2, 3]))
    assert not torch.equal(together[:, 0], together[:, 1])
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(together, train_population(task, [1, 2, 3], [0, steps]).regular)
