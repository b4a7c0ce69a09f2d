"""Stage 4: judge the generator."""

from collections.abc import Sequence

import torch

from mole.checkpoints.layouts import own_part
from mole.diffusion.request import Request
from mole.evaluation.figures import draw_figures
from mole.evaluation.judge import Exhibits, count_parts, examples, judge
from mole.evaluation.parts import Parts
from mole.files import value_digest
from mole.pipeline.current import Run
from mole.revision import revision
from mole.stages import Work, fingerprint
from mole.tasks import Task


def evaluate(current: Run) -> Work:
    """Judge the generator on held-out runs and test images, beside baselines and null models."""
    generator, seed, settings = current.generator, current.config.seed, current.config.evaluate
    own = current.task.to(torch.device("cpu"))  # judged there, wherever it was generated
    training = own_part(current.training, own)

    def draw(
        starts: torch.Tensor,
        target_loss: torch.Tensor,
        *,
        evaluations: int | None = None,
        seeds: Sequence[int] | None = None,
        task: Task | None = None,
        noise: int = 0,
    ) -> tuple[torch.Tensor, int]:
        support = None if seeds is None else examples(own, seeds, settings.support_images, seed)
        architecture = None if task is None else task.architecture
        request = Request(
            starts, {"target_loss": target_loss}, support, architecture, evaluations=evaluations or settings.evaluations
        )
        drawn = generator.draw(request, seed=seed + noise)
        return drawn.flat, drawn.evaluations

    exhibits = Exhibits(own, training, current.own_heldout, draw, settings, seed, tuple(generator.card.architectures))
    done, total = 0, count_parts(settings, subtasks=own.config.subtasks.differ)
    with current.reporter.stage("evaluate", total, "parts") as advance:

        def tick() -> None:
            nonlocal done
            done += 1
            advance(done)

        identity = value_digest([fingerprint(current.config, current.folder, "evaluate"), revision().source])
        result = judge(exhibits, Parts(current.folder.parts, identity, tick))
        advance(total)
    values = {f"novelty/{key}": value for key, value in result["novelty"].items()}
    values |= {f"sample/one_pass_{key}": result["one_pass"][key] for key in (f"{own.score}_mean", "loss_mean")}
    values["sample/alignment_r2"] = result["alignment"]["r2_mean"]
    current.log("evaluate", 0, {name: value for name, value in values.items() if value is not None})
    paths = draw_figures(current.folder.figures, result)
    return Work(paths, result)
