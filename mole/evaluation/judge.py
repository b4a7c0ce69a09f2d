"""All figures of merit of a generator, measured on held-out runs and test images.

Dimensions: S starts, Q prompts, M training runs, P parameters.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mole.checkpoints import Zoo
from mole.config import EvaluateConfig
from mole.evaluation.alignment import alignment, prompts
from mole.evaluation.novelty import PermutationDistance, dispersion, max_wrong_iou, ratio
from mole.evaluation.nulls import NULLS, null_models
from mole.evaluation.optimisers import OptimiserCurve, OptimizerName, best_of, curve_of, steps_to_match
from mole.evaluation.parts import Parts, without_nan
from mole.evaluation.sound import deviation, is_finite, mean, measure_sound
from mole.evaluation.transfer import (
    INITIALISATIONS,
    Draw,
    conditional_dispersion,
    recursive_passes,
    unseen_architecture,
    unseen_initialisation,
)
from mole.tasks import Architecture, Classification, Metrics, SplitName, Task, labelled

EVALUATIONS = (1, 2, 4, 8, 16)
"""Calls of the generator per network that are compared."""
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

    def measure(self, flat: Tensor, split: SplitName) -> Metrics:
        """Metrics of one network per start (S, P), or of any number where there are no sub-tasks; NaN where a network
        is not sound."""
        return measure_sound(self.task, flat, split, self.seeds)

    def scores(self, flat: Tensor) -> Tensor:
        """Test scores (S,) of such networks."""
        return self.measure(flat, "test")[self.task.score]

    def mean_score(self, flat: Tensor) -> float:
        return mean(self.scores(flat))

    @cached_property
    def trained_score(self) -> float:
        """Of training runs at their end, each on its own sub-task if there are such."""
        which = self.training.last
        return mean(measure_sound(self.task, self.final, "test", self._seeds(self.training, which))[self.task.score])

    @cached_property
    def sound(self) -> Tensor:
        """The generated networks without those that have NaN or infinite weights, (at most S, P)."""
        return self.generated[0][is_finite(self.generated[0])]

    @cached_property
    def chosen(self) -> Tensor:
        """Which of the final networks stand for all where leaving one out is asked for."""
        count = len(self.final[:MOST])
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[:REFERENCES]

    @cached_property
    def nulls(self) -> dict[str, Tensor]:
        """As many networks of each null model as there are starts."""
        near = self.distance.nearest(self.sound, self.final[:MOST])
        return null_models(
            self.distance, self.starts, self.final[:MOST], self.retrieved, noise_distance=mean(near), seed=self.seed,
            groups=self.nearest(16) if self.seeds is not None else None,
        )  # fmt: skip

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


def count_parts(config: EvaluateConfig, *, subtasks: bool) -> int:
    """How many parts an evaluation has, at most."""
    rates = len(config.adam_learning_rates) + len(config.sgd_learning_rates)
    count = 1 + len(EVALUATIONS) + 1 + rates + 3 + len(NULLS) + 3 * len(_fine_tuning_rates(config))
    if config.unseen:
        count += len(config.widths) + (0 if subtasks else len(INITIALISATIONS))
    return count + (config.repeats > 1 and not subtasks)


def judge(exhibits: Exhibits, parts: Parts) -> dict[str, Any]:
    """Everything that the evaluation adds to the report, the data of the figures included."""
    one_pass, curves = _one_pass(exhibits, parts)
    alignment_part = parts.get("alignment", lambda: _alignment(exhibits))
    novelty = parts.get("novelty", lambda: _novelty(exhibits))
    score = f"{exhibits.task.score}_mean"
    nulls, points = dict[str, Any](), dict[str, Any](novelty["points"])
    for name in NULLS:
        null = parts.get(f"null-{name}", lambda name=name: _null(exhibits, exhibits.nulls[name]))
        nulls[name], points[name] = null["figures"], null["points"]
    winners = [name for name, null in nulls.items() if _at_least(null[score], one_pass[score])]
    return without_nan(
        {
            "score": exhibits.task.score,
            "one_pass": one_pass,
            "alignment": alignment_part["figures"],
            "nulls": nulls,
            "nulls_at_least_as_accurate": winners,
            "novelty": novelty["figures"],
            "as_trained": parts.get("as_trained", lambda: _as_trained(exhibits)),
            "figures": {"alignment": alignment_part["curve"], "optimisers": curves, "novelty": points},
            **_transfer(exhibits, nulls, parts),
        }
    )


def _at_least(one: float | None, other: float | None) -> bool:
    """Whether a score is as good as another one; a score that is unknown is worse than any."""
    return one is not None and (other is None or one >= other)


def _one_pass(exhibits: Exhibits, parts: Parts) -> tuple[dict[str, Any], Any]:
    starts, config, seeds, name = exhibits.starts, exhibits.config, exhibits.seeds, exhibits.task.score
    report = parts.get("one_pass", lambda: _first_pass(exhibits))
    report[f"{name}_mean_by_evaluations"] = {
        str(count): parts.get(f"evaluations-{count}", lambda count=count: exhibits.mean_score(
            exhibits.draw(starts, exhibits.wanted(starts), evaluations=count, seeds=seeds)[0]))
        for count in EVALUATIONS
    }  # fmt: skip
    report[f"{name}_mean_by_passes"] = parts.get("passes", lambda: recursive_passes(
        exhibits.mean_score, exhibits.draw, starts, exhibits.best, seeds, config.passes))  # fmt: skip
    curves = []
    tried: dict[OptimizerName, list[float]] = {"adam": config.adam_learning_rates, "sgd": config.sgd_learning_rates}
    for optimizer, rates in tried.items():
        steps, part = config.optimizer_steps, f"optimiser-{optimizer}"
        curve = _best_curve(exhibits.task, parts, part, starts, seeds, optimizer, rates, steps)
        report[f"{optimizer}_steps_to_match"] = steps_to_match(curve, report[f"{name}_mean"])
        report[f"{optimizer}_learning_rate"] = curve.learning_rate
        curves.append(asdict(curve))
    return {**report, "optimizer_steps_tried": config.optimizer_steps}, curves


def _best_curve(
    task: Task,
    parts: Parts,
    part: str,
    starts: Tensor,
    seeds: Sequence[int] | None,
    optimizer: OptimizerName,
    rates: Sequence[float],
    steps: int,
) -> OptimiserCurve:
    """Training from starts (N, P), at the learning rate that is best on prompt images; each rate is a part."""
    curves = [
        parts.get(f"{part}-{rate:g}", lambda rate=rate: asdict(curve_of(task, starts, optimizer, rate, steps, seeds)))
        for rate in rates
    ]
    return best_of([OptimiserCurve(**curve) for curve in curves])


def _first_pass(exhibits: Exhibits) -> dict[str, Any]:
    """What one evaluation gives from starts that the generator has not seen."""
    starts, heldout, training, name = exhibits.starts, exhibits.heldout, exhibits.training, exhibits.task.score
    began = time.perf_counter()
    generated, evaluations = exhibits.generated
    seconds = (time.perf_counter() - began) / len(generated)
    metrics = exhibits.measure(generated, "test")
    scores = metrics[name]
    best = scores[scores.isfinite()]
    report = {
        "starts": len(starts),
        "target_loss": exhibits.best,
        f"{name}_mean": mean(scores),
        f"{name}_std": deviation(scores),
        f"{name}_best": float(best.max()) if len(best) else float("nan"),
        "loss_mean": mean(metrics["loss"]),
        "finite_fraction": float(metrics["loss"].isfinite().float().mean()),
        "prompt_split_loss_mean": mean(exhibits.measure(generated, "prompt")["loss"]),
        f"trained_{name}_mean": exhibits.trained_score,
        f"heldout_trained_{name}_mean": exhibits.mean_score(heldout.read(heldout.last[: len(starts)])),
        f"start_{name}_mean": exhibits.mean_score(starts),
        "network_evaluations": evaluations,
        "seconds_per_network": seconds,
    }
    if exhibits.seeds is None:
        training_starts = training.read(training.first[: 4 * len(starts)])
        drawn, _ = exhibits.draw(training_starts, exhibits.wanted(training_starts))
        report[f"training_starts_{name}_mean"] = exhibits.mean_score(drawn)
    return report


def _alignment(exhibits: Exhibits) -> dict[str, Any]:
    """Prompts are losses on prompt images; what was achieved is measured on test images."""
    task, starts, seeds = exhibits.task, exhibits.starts, exhibits.seeds
    count = exhibits.config.prompts
    start_loss = exhibits.heldout.loss[exhibits.first]
    prompted = prompts(exhibits.best, start_loss, count)  # (S, Q)
    many = None if seeds is None else [seed for seed in seeds for _ in range(count)]
    drawn, _ = exhibits.draw(starts.repeat_interleave(count, 0), prompted.flatten(), seeds=many)
    achieved = measure_sound(task, drawn, "test", many)["loss"].reshape(prompted.shape)
    achieved_prompt_split = measure_sound(task, drawn, "prompt", many)["loss"].reshape(prompted.shape)
    standing = exhibits.measure(starts, "test")["loss"]
    report = alignment(prompted, achieved, standing)
    same = alignment(prompted, achieved_prompt_split, exhibits.measure(starts, "prompt")["loss"])
    report["r2_mean_prompt_split"] = same["r2_mean"]
    sound = achieved[achieved.isfinite().all(1)]
    curve = {
        "prompted": prompted.mean(0).tolist(),
        "achieved_mean": sound.mean(0).tolist(),
        "achieved_std": sound.std(0, correction=0).tolist(),
        "zoo_range": [exhibits.best, float(exhibits.training.loss.max())],
        "noop": mean(standing),
    }
    return {"figures": report, "curve": curve}


def _novelty(exhibits: Exhibits) -> dict[str, Any]:
    final, distance, sound, chosen = exhibits.final[:MOST], exhibits.distance, exhibits.sound, exhibits.chosen
    near = distance.nearest(sound, final)
    leave_one_out = distance.nearest(final[chosen], final, exclude=chosen)
    figures = {
        "nearest_training_distance": mean(near),
        "training_leave_one_out_distance": mean(leave_one_out),
        "ratio": ratio(mean(near), mean(leave_one_out)),
        "dispersion": dispersion(sound, final),
        "diversity": ratio(distance.spread(sound), distance.spread(final[chosen])),
    }
    if isinstance(exhibits.task, Classification) and exhibits.seeds is None:
        wrong, others = _wrong(exhibits.task, sound), _wrong(exhibits.task, final)
        figures["max_wrong_iou_mean"] = mean(max_wrong_iou(wrong, others))
        figures["training_max_wrong_iou_mean"] = mean(max_wrong_iou(others[chosen], others, exclude=chosen))
    generated = exhibits.generated[0]
    points = {"generated": _points(exhibits.scores(generated)[is_finite(generated)], near)}
    if exhibits.seeds is None:
        points["training"] = _points(exhibits.scores(final[chosen]), leave_one_out)
    return {"figures": figures, "points": points}


def _null(exhibits: Exhibits, flat: Tensor) -> dict[str, Any]:
    """The figures of one null model's networks (S, P)."""
    distance, final, sound = exhibits.distance, exhibits.final[:MOST], flat[is_finite(flat)]
    metrics, far = exhibits.measure(flat, "test"), distance.nearest(sound, final)
    figures = {
        f"{exhibits.task.score}_mean": mean(metrics[exhibits.task.score]),
        "loss_mean": mean(metrics["loss"]),
        "prompt_split_loss_mean": mean(exhibits.measure(flat, "prompt")["loss"]),
        "nearest_training_distance": mean(far),
        "diversity": ratio(distance.spread(sound), distance.spread(final[exhibits.chosen])),
    }
    return {"figures": figures, "points": _points(metrics[exhibits.task.score][is_finite(flat)], far)}


def _as_trained(exhibits: Exhibits) -> dict[str, float]:
    """Networks asked for the losses that the held-out runs end with, beside what these end with: like with like."""
    task, seeds = exhibits.task, exhibits.seeds
    ends = exhibits.heldout.last[: len(exhibits.starts)]
    true = exhibits.heldout.read(ends)
    drawn, _ = exhibits.draw(exhibits.starts, exhibits.heldout.loss[ends], seeds=seeds)
    figures: dict[str, float] = {}
    for whose, flat in (("", drawn), ("trained_", true)):
        scores = exhibits.scores(flat)
        figures |= {f"{whose}{task.score}_mean": mean(scores), f"{whose}{task.score}_std": deviation(scores)}
    drawn = drawn[is_finite(drawn)]
    spread = ratio(exhibits.distance.spread(drawn), exhibits.distance.spread(true))
    return {**figures, "dispersion": dispersion(drawn, true), "diversity": spread}


def _fine_tuning_rates(config: EvaluateConfig) -> list[float]:
    return sorted({rate / 10 for rate in config.adam_learning_rates} | set(config.adam_learning_rates))


def _transfer(exhibits: Exhibits, nulls: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """Other initialisations, other widths, spread within one condition, and fine-tuning beside the best null model."""
    task, config, draw, best_loss = exhibits.task, exhibits.config, exhibits.draw, exhibits.best
    figures: dict[str, Any] = {"fine_tuning": _fine_tuning(exhibits, nulls, parts)}
    if config.unseen and exhibits.seeds is None:
        figures["unseen_initialisations"] = {
            scheme: parts.get(f"initialisation-{scheme}", lambda scheme=scheme: unseen_initialisation(
                task, draw, best_loss, scheme, config.unseen))
            for scheme in INITIALISATIONS
        }  # fmt: skip
    if config.unseen and config.widths:
        figures["widths"] = [
            parts.get(f"width-{width}", lambda width=width: unseen_architecture(
                task, draw, best_loss, width, exhibits.architectures, config.unseen))
            for width in config.widths
        ]  # fmt: skip
    if config.repeats > 1 and exhibits.seeds is None:
        figures["conditional_dispersion"] = parts.get("conditional_dispersion", lambda: conditional_dispersion(
            task, draw, exhibits.starts[:8], best_loss, config.repeats))  # fmt: skip
    return figures


def _fine_tuning(exhibits: Exhibits, nulls: dict[str, Any], parts: Parts) -> list[dict[str, Any]]:
    """Adam from generated networks, from the starts and from the best null model, each at its own best rate."""
    losses = {name: null["prompt_split_loss_mean"] for name, null in nulls.items()}
    best = min((name for name in losses if losses[name] is not None), key=lambda name: losses[name], default="start")
    rows = []
    for origin in dict.fromkeys(("generated", "start", best)):
        flat = exhibits.generated[0] if origin == "generated" else exhibits.nulls[origin]
        sound = is_finite(flat)
        if sound.any():
            steps, rates = min(100, exhibits.config.optimizer_steps), _fine_tuning_rates(exhibits.config)
            seeds = exhibits.seeds
            if seeds is not None:
                seeds = [seed for seed, is_sound in zip(seeds, sound.tolist(), strict=True) if is_sound]
            part = f"fine_tuning-{origin}"
            curve = _best_curve(exhibits.task, parts, part, flat[sound], seeds, "adam", rates, steps)
            rows.append({"origin": origin, **asdict(curve)})
    return rows


def _points(score: Tensor, distance: Tensor) -> dict[str, list[float]]:
    return {"score": score.tolist(), "distance": distance.tolist()}


def _wrong(task: Classification, flat: Tensor) -> Tensor:
    """Which test images each network (N, P) gets wrong: (N, B) bool."""
    images = task.test.images
    parts = [task.logits(part, images).argmax(-1) != task.test.labels for part in flat.split(256)]
    return torch.cat(parts)
