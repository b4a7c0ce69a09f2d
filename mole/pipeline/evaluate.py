"""Stage 4: judge the generator."""

import torch

from mole.evaluation.figures import draw_figures
from mole.evaluation.judge import PARTS, Exhibits, judge
from mole.pipeline.current import Result, Run


def evaluate(current: Run) -> Result:
    """Judge the generator on held-out runs and test images, beside baselines and null models."""
    training, heldout = current.training, current.heldout
    generator, seed = current.generator, current.config.seed

    def draw(starts: torch.Tensor, target_loss: torch.Tensor, evaluations: int) -> tuple[torch.Tensor, int]:
        drawn = generator.draw(starts, target_loss, seed=seed, evaluations=evaluations)
        return drawn.flat, drawn.evaluations

    task = current.classifier(torch.device("cpu"))  # judged there, wherever it was generated
    exhibits = Exhibits(task, training, heldout, draw, current.config.evaluate, seed)
    done = 0
    with current.reporter.stage("evaluate", PARTS, "parts") as advance:

        def tick() -> None:
            nonlocal done
            done += 1
            advance(done)

        result = judge(exhibits, tick)
    values = {f"novelty/{key}": value for key, value in result["novelty"].items()}
    values |= {f"sample/one_pass_{key}": result["one_pass"][key] for key in ("accuracy_mean", "loss_mean")}
    current.log("evaluate", 0, {**values, "sample/alignment_r2": result["alignment"]["r2_mean"]})
    paths = draw_figures(current.folder.figures, result)
    return paths, result
