"""All figures of merit of a generator, measured on held-out runs and test images.

Dimensions: S starts, Q prompts, M training runs, P parameters.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mole.checkpoints import Zoo
from mole.config import EvaluateConfig
from mole.evaluation.alignment import alignment, prompts
from mole.evaluation.novelty import PermutationDistance, dispersion, max_wrong_iou, ratio
from mole.evaluation.nulls import null_models
from mole.evaluation.optimisers import best_curve, steps_to_match
from mole.evaluation.transfer import (
    Draw,
    conditional_dispersion,
    fine_tuning,
    recursive_passes,
    unseen_architectures,
    unseen_initialisations,
)
from mole.tasks import Architecture, Classification, Task, labelled

Tick = Callable[[], None]
"""Called after each part; there are `PARTS` of them."""

PARTS = 7
REFERENCES = 64
"""Training networks whose leave-one-out distances stand for all."""
MOST = 2**14
"""Training networks that distances are measured to, at most."""


@dataclass(frozen=True)
class Exhibits:
    """What is judged, and against what; every tensor on the CPU."""

    task: Task
    training: Zoo
    """Runs of the task's own networks that the generator has learned from."""
    heldout: Zoo
    """Runs of such networks that it has not."""
    draw: Draw
    config: EvaluateConfig
    seed: int
    architectures: tuple[Architecture, ...] = ()
    """Of the networks that the generator has learned from."""

    @property
    def first(self) -> Tensor:
        """(S,), where the first states of held-out runs are."""
        return self.heldout.first[: self.config.starts]

    @cached_property
    def starts(self) -> Tensor:
        """(S, P)."""
        return self.heldout.read(self.first)

    @cached_property
    def seeds(self) -> list[int] | None:
        """Of the held-out runs, where they decide their sub-tasks."""
        return self._seeds(self.heldout, self.first)

    def _seeds(self, zoo: Zoo, which: Tensor) -> list[int] | None:
        return zoo.column("seed")[which.numpy()].tolist() if self.task.config.subtasks.differ else None

    @property
    def best(self) -> float:
        """The lowest loss in the zoo: the prompt of the one-pass figures."""
        return float(self.training.loss.min())

    @cached_property
    def final(self) -> Tensor:
        """Last states (M, P) of training runs."""
        return self.training.read(self.training.last)

    @cached_property
    def distance(self) -> PermutationDistance:
        return PermutationDistance(self.training.spec, self.final[0])

    def wanted(self, starts: Tensor) -> Tensor:
        """The best loss for each of the starts."""
        return torch.full((len(starts),), self.best)

    @cached_property
    def generated(self) -> tuple[Tensor, int]:
        """One pass from the starts: weights (S, P), evaluations per network."""
        return self.draw(self.starts, self.wanted(self.starts), seeds=self.seeds)

    def scores(self, flat: Tensor) -> Tensor:
        """Test scores (S,) of one network per start (S, P), or of any number where there are no sub-tasks."""
        return self.task.measure(flat, "test", self.seeds)[self.task.score]

    def mean_score(self, flat: Tensor) -> float:
        return float(self.scores(flat).mean())

    @cached_property
    def trained_score(self) -> float:
        """Of training runs at their end, each on its own sub-task if there are such."""
        which = self.training.last
        return float(self.task.measure(self.final, "test", self._seeds(self.training, which))[self.task.score].mean())

    @cached_property
    def retrieved(self) -> Tensor:
        """(S, P): the zoo's checkpoints with the loss nearest to the prompt; where there are sub-tasks, for each start
        the training network that does best on the labelled examples that the generator is given."""
        return self.nearest(1)[:, 0]

    def nearest(self, count: int) -> Tensor:
        """(S, count, P): the best training networks for each start's sub-task, judged by its labelled examples."""
        if self.seeds is None:
            order = (self.training.loss - self.best).abs().argsort()[: len(self.starts)]
            return self.training.read(order)[:, None]
        images, labels = examples(self.task, self.seeds, self.config.support_images, self.seed)
        rows = []
        for image, label in zip(images, labels, strict=True):
            losses = torch.cat([labelled(self.task).losses(part, image, label) for part in self.final.split(512)])
            rows.append(self.final[losses.argsort()[:count]])
        return torch.stack(rows)


def examples(task: Task, seeds: Sequence[int], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labelled training examples of the sub-tasks of these runs, always the same ones: (S, count, M), (S, count)."""
    return labelled(task).support(seeds, count, torch.Generator().manual_seed(seed))


def judge(exhibits: Exhibits, tick: Tick) -> dict[str, Any]:
    """Everything that the evaluation adds to the report, the data of the figures included."""
    began = time.perf_counter()
    generated, evaluations = exhibits.generated
    seconds = (time.perf_counter() - began) / len(generated)
    one_pass, optimiser_curves = _one_pass(exhibits, tick)
    one_pass |= {"network_evaluations": evaluations, "seconds_per_network": seconds}
    obedience, curve = _alignment(exhibits)
    tick()
    models = _null_models(exhibits)
    novelty, nulls, points = _novelty(exhibits, models, tick)
    mean = f"{exhibits.task.score}_mean"
    winners = [name for name, null in nulls.items() if null[mean] >= one_pass[mean]]
    result = {
        "score": exhibits.task.score,
        "one_pass": one_pass,
        "alignment": obedience,
        "nulls": nulls,
        "nulls_at_least_as_accurate": winners,
        "novelty": novelty,
        "as_trained": _as_trained(exhibits),
        "figures": {"alignment": curve, "optimisers": optimiser_curves, "novelty": points},
        **_transfer(exhibits, nulls, models),
    }
    tick()
    return _finite(result)


def _one_pass(exhibits: Exhibits, tick: Tick) -> tuple[dict[str, Any], Any]:
    task, starts, config, seeds = exhibits.task, exhibits.starts, exhibits.config, exhibits.seeds
    generated, _ = exhibits.generated
    found = task.measure(generated, "test", seeds)
    name, scores = task.score, found[task.score]
    score = float(scores.mean())
    more = {
        str(k): exhibits.mean_score(exhibits.draw(starts, exhibits.wanted(starts), evaluations=k, seeds=seeds)[0])
        for k in (1, 2, 4, 8, 16)
    }
    again = recursive_passes(exhibits.mean_score, exhibits.draw, starts, exhibits.best, seeds, config.passes)
    tick()
    adam = best_curve(task, starts, "adam", config.adam_learning_rates, config.optimizer_steps, seeds)
    tick()
    sgd = best_curve(task, starts, "sgd", config.sgd_learning_rates, config.optimizer_steps, seeds)
    tick()
    report = {
        "starts": len(starts),
        "target_loss": exhibits.best,
        f"{name}_mean": score,
        f"{name}_std": _deviation(scores),
        f"{name}_best": float(scores.max()),
        "loss_mean": float(found["loss"].mean()),
        "finite_fraction": float(generated.isfinite().all(1).float().mean()),
        "prompt_split_loss_mean": float(task.measure(generated, "prompt", seeds)["loss"].mean()),
        f"trained_{name}_mean": exhibits.trained_score,
        f"heldout_trained_{name}_mean": exhibits.mean_score(
            exhibits.heldout.read(exhibits.heldout.last[: len(starts)])
        ),
        f"start_{name}_mean": exhibits.mean_score(starts),
        f"{name}_mean_by_evaluations": more,
        f"{name}_mean_by_passes": again,
        "adam_steps_to_match": steps_to_match(adam, score),
        "adam_learning_rate": adam.learning_rate,
        "sgd_steps_to_match": steps_to_match(sgd, score),
        "sgd_learning_rate": sgd.learning_rate,
        "optimizer_steps_tried": config.optimizer_steps,
    }
    if seeds is None:
        training_starts = exhibits.training.read(exhibits.training.first[: 4 * len(starts)])
        drawn, _ = exhibits.draw(training_starts, exhibits.wanted(training_starts))
        report[f"training_starts_{name}_mean"] = exhibits.mean_score(drawn)
    return report, [asdict(curve) for curve in (adam, sgd)]


def _deviation(scores: Tensor) -> float:
    return float(scores.std()) if len(scores) > 1 else 0.0


def _finite(value: Any) -> Any:
    """JSON has no NaN: what a diverged network or optimiser reached becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _alignment(exhibits: Exhibits) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prompts are losses on prompt images; what was achieved is measured on test images."""
    task, starts, seeds = exhibits.task, exhibits.starts, exhibits.seeds
    count = exhibits.config.prompts
    start_loss = exhibits.heldout.loss[exhibits.first]
    prompted = prompts(exhibits.best, start_loss, count)  # (S, Q)
    many = None if seeds is None else [seed for seed in seeds for _ in range(count)]
    drawn, _ = exhibits.draw(starts.repeat_interleave(count, 0), prompted.flatten(), seeds=many)
    achieved = task.measure(drawn, "test", many)["loss"].reshape(prompted.shape)
    achieved_prompt_split = task.measure(drawn, "prompt", many)["loss"].reshape(prompted.shape)
    standing = task.measure(starts, "test", seeds)["loss"]
    report = alignment(prompted, achieved, standing)
    same = alignment(prompted, achieved_prompt_split, task.measure(starts, "prompt", seeds)["loss"])
    report["r2_mean_prompt_split"] = same["r2_mean"]
    curve = {
        "prompted": prompted.mean(0).tolist(),
        "achieved_mean": achieved.mean(0).tolist(),
        "achieved_std": achieved.std(0, correction=0).tolist(),
        "zoo_range": [exhibits.best, float(exhibits.training.loss.max())],
        "noop": float(standing.mean()),
    }
    return report, curve


def _null_models(exhibits: Exhibits) -> dict[str, Tensor]:
    """As many networks of each as there are starts."""
    final, (generated, _) = exhibits.final[:MOST], exhibits.generated
    near = exhibits.distance.nearest(generated, final)
    return null_models(
        exhibits.distance, exhibits.starts, final, exhibits.retrieved, noise_distance=float(near.mean()),
        seed=exhibits.seed, groups=exhibits.nearest(16) if exhibits.seeds is not None else None,
    )  # fmt: skip


def _novelty(exhibits: Exhibits, models: dict[str, Tensor], tick: Tick) -> tuple[dict[str, Any], dict[str, Any], Any]:
    final, distance, (generated, _) = exhibits.final[:MOST], exhibits.distance, exhibits.generated
    near = distance.nearest(generated, final)
    chosen = torch.randperm(len(final), generator=torch.Generator().manual_seed(exhibits.seed))[:REFERENCES]
    leave_one_out = distance.nearest(final[chosen], final, exclude=chosen)
    tick()
    novelty = {
        "nearest_training_distance": float(near.mean()),
        "training_leave_one_out_distance": float(leave_one_out.mean()),
        "ratio": ratio(float(near.mean()), float(leave_one_out.mean())),
        "dispersion": dispersion(generated, final),
        "diversity": ratio(distance.spread(generated), distance.spread(final[chosen])),
    }
    if isinstance(exhibits.task, Classification) and exhibits.seeds is None:
        wrong, others = _wrong(exhibits.task, generated), _wrong(exhibits.task, final)
        novelty["max_wrong_iou_mean"] = float(max_wrong_iou(wrong, others).mean())
        novelty["training_max_wrong_iou_mean"] = float(max_wrong_iou(others[chosen], others, exclude=chosen).mean())
    points = {"generated": _points(exhibits.scores(generated), near)}
    if exhibits.seeds is None:
        points["training"] = _points(exhibits.scores(final[chosen]), leave_one_out)
    nulls, score = {}, exhibits.task.score
    for name, flat in models.items():
        found, far = exhibits.task.measure(flat, "test", exhibits.seeds), distance.nearest(flat, final)
        nulls[name] = {
            f"{score}_mean": float(found[score].mean()), "loss_mean": float(found["loss"].mean()),
            "prompt_split_loss_mean": float(exhibits.task.measure(flat, "prompt", exhibits.seeds)["loss"].mean()),
            "nearest_training_distance": float(far.mean()),
            "diversity": ratio(distance.spread(flat), distance.spread(final[chosen])),
        }  # fmt: skip
        points[name] = _points(found[score], far)
    tick()
    return novelty, nulls, points


def _as_trained(exhibits: Exhibits) -> dict[str, float]:
    """Networks asked for the losses that the held-out runs end with, beside what these end with: like with like."""
    task, seeds = exhibits.task, exhibits.seeds
    ends = exhibits.heldout.last[: len(exhibits.starts)]
    true = exhibits.heldout.read(ends)
    drawn, _ = exhibits.draw(exhibits.starts, exhibits.heldout.loss[ends], seeds=seeds)
    found: dict[str, float] = {}
    for whose, flat in (("", drawn), ("trained_", true)):
        scores = exhibits.scores(flat)
        found |= {f"{whose}{task.score}_mean": float(scores.mean()),
                  f"{whose}{task.score}_std": _deviation(scores)}  # fmt: skip
    spread = ratio(exhibits.distance.spread(drawn), exhibits.distance.spread(true))
    return {**found, "dispersion": dispersion(drawn, true), "diversity": spread}


def _transfer(exhibits: Exhibits, nulls: dict[str, Any], models: dict[str, Tensor]) -> dict[str, Any]:
    """Other initialisations, other widths, spread within one condition, and fine-tuning beside the best null model."""
    task, config, draw = exhibits.task, exhibits.config, exhibits.draw
    (generated, _), found = exhibits.generated, dict[str, Any]()
    best = min(nulls, key=lambda name: nulls[name]["prompt_split_loss_mean"])
    origins = {"generated": generated, "start": exhibits.starts, best: models[best]}
    rates = sorted({rate / 10 for rate in config.adam_learning_rates} | set(config.adam_learning_rates))
    steps = min(100, config.optimizer_steps)
    found["fine_tuning"] = fine_tuning(task, origins, rates, steps, exhibits.seeds)
    if config.unseen and exhibits.seeds is None:
        found["unseen_initialisations"] = unseen_initialisations(task, draw, exhibits.best, config.unseen)
    if config.unseen and config.widths:
        found["widths"] = unseen_architectures(
            task, draw, exhibits.best, config.widths, exhibits.architectures, config.unseen
        )  # fmt: skip
    if config.repeats > 1 and exhibits.seeds is None:
        starts = exhibits.starts[:8]
        found["conditional_dispersion"] = conditional_dispersion(task, draw, starts, exhibits.best, config.repeats)
    return found


def _points(score: Tensor, distance: Tensor) -> dict[str, list[float]]:
    return {"score": score.tolist(), "distance": distance.tolist()}


def _wrong(task: Classification, flat: Tensor) -> Tensor:
    """Which test images each network (N, P) gets wrong: (N, B) bool."""
    images = task.test.images
    parts = [task.logits(part, images).argmax(-1) != task.test.labels for part in flat.split(256)]
    return torch.cat(parts)
