"""Beyond what the generator has seen: other initialisations, other architectures, and what its networks are good for.

Dimensions: S starts, N networks, P parameters.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mole.checkpoints import train_population
from mole.evaluation.sound import is_finite, mean, measure_sound
from mole.seeding import derived
from mole.tasks import Architecture, Task

INITIALISATIONS: dict[str, Callable[[Tensor], Any]] = {
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "kaiming_fan_in": lambda w: nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"),
    "kaiming_fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
}
"""Of the weights; biases are 0. Networks in zoos start from PyTorch's default."""


class Draw(Protocol):
    """Any generator: from start networks and wanted losses to networks."""

    def __call__(
        self,
        starts: Tensor,
        target_loss: Tensor,
        *,
        evaluations: int | None = None,
        seeds: Sequence[int] | None = None,
        task: Task | None = None,
        noise: int = 0,
    ) -> tuple[Tensor, int]:
        """Weights (N, P), and evaluations made per network.

        Args:
            starts: (N, P).
            target_loss: (N,), in nats.
            evaluations: wanted per network; by default as many as the generator is judged with.
            seeds: of the runs whose sub-tasks the networks are for, (N,).
            task: the task with other networks than usual.
            noise: changes the noise of the generator.
        """
        ...


def initial(task: Task, scheme: str, count: int) -> Tensor:
    """Weights (count, P) initialised by one of `INITIALISATIONS`."""
    rows = []
    for number in range(count):
        network = task.architecture.build(seed=0)
        generator = torch.random.fork_rng()
        with generator, torch.no_grad():
            torch.manual_seed(derived("initialisation", number))
            for parameter in network.parameters():
                INITIALISATIONS[scheme](parameter) if parameter.ndim > 1 else parameter.zero_()
        rows.append(task.spec.flatten(network.state_dict()))
    return torch.stack(rows)


def unseen_initialisation(task: Task, draw: Draw, best: float, scheme: str, count: int) -> dict[str, float]:
    """One pass from an initialisation that no zoo has: test score before and after, mean over `count` starts."""
    starts = initial(task, scheme, count)
    drawn, _ = draw(starts, torch.full((count,), best))
    return {f"start_{task.score}_mean": _score(task, starts), f"{task.score}_mean": _score(task, drawn)}


def unseen_architecture(
    task: Task, draw: Draw, best: float, width: int, seen: Collection[Architecture], count: int
) -> dict[str, Any]:
    """One pass for networks of a width, beside as many networks of that width trained by the task's recipe."""
    other, name = task.with_config(task.config.model_copy(update={"width": width})), task.score
    seeds = [derived("trial", number) for number in range(count)]
    starts = other.initial(seeds)
    drawn, _ = draw(starts, torch.full((count,), best), task=other)
    trained = train_population(other, seeds, [task.config.steps], initial=starts).weights
    return {
        "width": width, "in_zoo": other.architecture in seen, f"{name}_mean": _score(other, drawn),
        f"start_{name}_mean": _score(other, starts), f"trained_{name}_mean": _score(other, trained),
    }  # fmt: skip


def recursive_passes(
    measure: Callable[[Tensor], float],
    draw: Draw,
    starts: Tensor,
    best: float,
    seeds: Sequence[int] | None,
    passes: int,
) -> list[float]:
    """Mean test score after each of several passes, every one of them starting from what the last one made."""
    found, flat = [], starts
    for number in range(passes):
        flat, _ = draw(flat, torch.full((len(flat),), best), seeds=seeds, noise=number)
        found.append(measure(flat))
    return found


def conditional_dispersion(task: Task, draw: Draw, starts: Tensor, best: float, repeats: int) -> dict[str, Any]:
    """Is one evaluation a draw, or a mean? Spread of networks from one start, over the noise of the generator, and over
    the order of the data of an optimiser; each root-mean-square, averaged over starts."""
    many = starts.repeat_interleave(repeats, 0)
    drawn, _ = draw(many, torch.full((len(many),), best))
    seeds = [derived("trial", number) for number in range(len(many))]
    trained = train_population(task, seeds, [task.config.steps], initial=many).weights
    if len(trained) < len(many) or not is_finite(drawn).all():  # some diverged
        return {"starts": len(starts), "repeats": repeats, "generated": None, "trained": None, "ratio": None}
    spreads = [flat.unflatten(0, (-1, repeats)) for flat in (drawn, trained)]
    mine, theirs = (float((s - s.mean(1, keepdim=True)).square().sum(-1).mean().sqrt()) for s in spreads)
    return {"starts": len(starts), "repeats": repeats, "generated": mine, "trained": theirs, "ratio": mine / theirs}


def _score(task: Task, flat: Tensor) -> float:
    return mean(measure_sound(task, flat, "test")[task.score])
