"""All figures of merit of a generator, measured on held-out runs and test images.

Dimensions: S starts, Q prompts, M training runs, P parameters.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mole.checkpoints import Zoo
from mole.config import EvaluateConfig
from mole.evaluation.alignment import alignment, prompts
from mole.evaluation.novelty import PermutationDistance, dispersion, max_wrong_iou
from mole.evaluation.nulls import null_models
from mole.evaluation.optimisers import best_curve, steps_to_match
from mole.tasks import Classification

Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, int]]
"""(starts (N, P), target losses (N,), evaluations wanted) -> weights (N, P), evaluations made per network."""

Tick = Callable[[], None]
"""Called after each part; there are `PARTS` of them."""

PARTS = 6
REFERENCES = 64
"""Training networks whose leave-one-out distances stand for all."""


@dataclass(frozen=True)
class Exhibits:
    """What is judged, and against what; every tensor on the CPU."""

    task: Classification
    training: Zoo
    heldout: Zoo
    draw: Draw
    config: EvaluateConfig
    seed: int

    @property
    def starts(self) -> Tensor:
        """First states (S, P) of held-out runs."""
        return self.heldout.read(self.heldout.first[: self.config.starts])

    @property
    def best(self) -> float:
        """The lowest loss in the zoo: the prompt of the one-pass figures."""
        return float(self.training.loss.min())

    @cached_property
    def final(self) -> Tensor:
        """Last states (M, P) of training runs."""
        return self.training.read(self.training.last)

    def generate(self, starts: Tensor, evaluations: int = 1) -> tuple[Tensor, int]:
        """Networks prompted for the best loss."""
        return self.draw(starts, torch.full((len(starts),), self.best), evaluations)

    def accuracy(self, flat: Tensor) -> Tensor:
        """Test accuracies of networks (N, P): (N,)."""
        return self.task.measure(flat, "test")["accuracy"]


def judge(exhibits: Exhibits, tick: Tick) -> dict[str, Any]:
    """Everything that the evaluation adds to the report, the data of the figures included."""
    began = time.perf_counter()
    generated, evaluations = exhibits.generate(exhibits.starts)
    seconds = (time.perf_counter() - began) / len(generated)
    one_pass, optimiser_curves = _one_pass(exhibits, generated, tick)
    one_pass |= {"network_evaluations": evaluations, "seconds_per_network": seconds}
    obedience, curve = _alignment(exhibits)
    tick()
    novelty, nulls, points = _novelty(exhibits, generated, tick)
    winners = [name for name, null in nulls.items() if null["accuracy_mean"] >= one_pass["accuracy_mean"]]
    result = {
        "one_pass": one_pass,
        "alignment": obedience,
        "nulls": nulls,
        "nulls_at_least_as_accurate": winners,
        "novelty": novelty,
        "figures": {"alignment": curve, "optimisers": optimiser_curves, "novelty": points},
    }
    return _finite(result)


def _one_pass(exhibits: Exhibits, generated: Tensor, tick: Tick) -> tuple[dict[str, Any], Any]:
    task, starts, config = exhibits.task, exhibits.starts, exhibits.config
    found = task.measure(generated, "test")
    accuracy = float(found["accuracy"].mean())
    training_starts = exhibits.training.read(exhibits.training.first[: 4 * len(starts)])
    more = {str(k): float(exhibits.accuracy(exhibits.generate(starts, k)[0]).mean()) for k in (4, 16)}
    tick()
    adam = best_curve(task, starts, "adam", config.adam_learning_rates, config.optimizer_steps)
    tick()
    sgd = best_curve(task, starts, "sgd", config.sgd_learning_rates, config.optimizer_steps)
    tick()
    report = {
        "starts": len(starts),
        "target_loss": exhibits.best,
        "accuracy_mean": accuracy,
        "accuracy_std": float(found["accuracy"].std()) if len(starts) > 1 else 0.0,
        "accuracy_best": float(found["accuracy"].max()),
        "loss_mean": float(found["loss"].mean()),
        "prompt_split_loss_mean": float(task.measure(generated, "prompt")["loss"].mean()),
        "trained_accuracy_mean": float(exhibits.accuracy(exhibits.final).mean()),
        "start_accuracy_mean": float(exhibits.accuracy(starts).mean()),
        "training_starts_accuracy_mean": float(exhibits.accuracy(exhibits.generate(training_starts)[0]).mean()),
        "accuracy_mean_by_evaluations": {"1": accuracy, **more},
        "adam_steps_to_match": steps_to_match(adam, accuracy),
        "adam_learning_rate": adam.learning_rate,
        "sgd_steps_to_match": steps_to_match(sgd, accuracy),
        "sgd_learning_rate": sgd.learning_rate,
        "optimizer_steps_tried": config.optimizer_steps,
    }
    return report, [asdict(curve) for curve in (adam, sgd)]


def _finite(value: Any) -> Any:
    """JSON has no NaN: what a diverged network or optimiser reached becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _alignment(exhibits: Exhibits) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prompts are losses on prompt images; what was achieved is measured on test images."""
    task, starts = exhibits.task, exhibits.starts
    count = exhibits.config.prompts
    start_loss = exhibits.heldout.loss[exhibits.heldout.first[: len(starts)]]
    prompted = prompts(exhibits.best, start_loss, count)  # (S, Q)
    drawn, _ = exhibits.draw(starts.repeat_interleave(count, 0), prompted.flatten(), 1)
    achieved = task.measure(drawn, "test")["loss"].reshape(prompted.shape)
    achieved_prompt_split = task.measure(drawn, "prompt")["loss"].reshape(prompted.shape)
    report = alignment(prompted, achieved, task.measure(starts, "test")["loss"])
    same = alignment(prompted, achieved_prompt_split, task.measure(starts, "prompt")["loss"])
    report["r2_mean_prompt_split"] = same["r2_mean"]
    curve = {
        "prompted": prompted.mean(0).tolist(),
        "achieved_mean": achieved.mean(0).tolist(),
        "achieved_std": achieved.std(0, correction=0).tolist(),
        "zoo_range": [exhibits.best, float(exhibits.training.loss.max())],
        "noop": float(task.measure(starts, "test")["loss"].mean()),
    }
    return report, curve


def _novelty(exhibits: Exhibits, generated: Tensor, tick: Tick) -> tuple[dict[str, Any], dict[str, Any], Any]:
    training, starts, final = exhibits.training, exhibits.starts, exhibits.final
    distance = PermutationDistance(training.spec)
    near = distance.nearest(generated, final)
    chosen = torch.randperm(len(final), generator=torch.Generator().manual_seed(exhibits.seed))[:REFERENCES]
    leave_one_out = distance.nearest(final[chosen], final, exclude=chosen)
    tick()
    wrong, training_wrong = _wrong(exhibits.task, generated), _wrong(exhibits.task, final)
    novelty = {
        "nearest_training_distance": float(near.mean()),
        "training_leave_one_out_distance": float(leave_one_out.mean()),
        "ratio": float(near.mean() / leave_one_out.mean()),
        "max_wrong_iou_mean": float(max_wrong_iou(wrong, training_wrong).mean()),
        "training_max_wrong_iou_mean": float(
            max_wrong_iou(training_wrong[chosen], training_wrong, exclude=chosen).mean()
        ),
        "dispersion": dispersion(generated, final),
    }
    retrieved = training.read((training.loss - exhibits.best).abs().argsort()[: len(starts)])
    models = null_models(distance, starts, final, retrieved, noise_distance=float(near.mean()), seed=exhibits.seed)
    points = {"generated": _points(exhibits.accuracy(generated), near)}
    points["training"] = _points(exhibits.accuracy(final[chosen]), leave_one_out)
    nulls = {}
    for name, flat in models.items():
        accuracy, far = exhibits.accuracy(flat), distance.nearest(flat, final)
        nulls[name] = {"accuracy_mean": float(accuracy.mean()), "nearest_training_distance": float(far.mean())}
        points[name] = _points(accuracy, far)
    tick()
    return novelty, nulls, points


def _points(accuracy: Tensor, distance: Tensor) -> dict[str, list[float]]:
    return {"accuracy": accuracy.tolist(), "distance": distance.tolist()}


def _wrong(task: Classification, flat: Tensor) -> Tensor:
    """Which test images each network (N, P) gets wrong: (N, B) bool."""
    images = task.test.images
    parts = [task.logits(part, images).argmax(-1) != task.test.labels for part in flat.split(256)]
    return torch.cat(parts)
