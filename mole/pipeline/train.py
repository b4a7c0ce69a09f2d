"""Stage 2: train the generator."""

from mole.diffusion.generator import versions
from mole.pipeline.current import Result, Run
from mole.stages import fingerprint


def train(current: Run) -> Result:
    """Train the generator; its state is on disk every few hundred steps."""
    from mole.diffusion.training import Data, train_generator  # Lightning takes seconds to import

    config, folder = current.config, current.folder
    training, heldout = current.zoo
    resumed_from = 0

    def on_resume(step: int) -> None:
        nonlocal resumed_from
        resumed_from = step
        current.metrics.rewind("train", step)

    with current.reporter.stage("train", config.train.steps, "steps") as advance:
        generator, seconds, before = train_generator(
            config,
            Data(current.classifier(current.device), training, heldout),
            folder.training_state,
            identity=fingerprint(config, folder, "train"),
            device=current.device,
            progress=advance,
            log=lambda step, values: current.log("train", step, dict(values)),
            on_resume=on_resume,
        )
    generator = generator.save(folder.generator)
    current.ledger.append(
        [
            {
                "kind": "entity", "type": "generator", "digest": generator.digest,
                "wasDerivedFrom": {"zoo": training.digest}, "config": generator.card.denoiser.model_dump(mode="json"),
                "wasGeneratedBy": {
                    "activity": "train", "settings": config.train.model_dump(mode="json"), "seed": config.seed,
                    "versions": versions(),
                },
            }
        ]
    )  # fmt: skip
    report = {
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()), "steps": config.train.steps,
        "seconds": seconds, "steps_per_second": config.train.steps / max(seconds, 1e-9),
        "resumed_from_step": resumed_from, "digest": generator.digest,
    }  # fmt: skip
    outputs = [folder.generator / name for name in ("config.json", "model.safetensors")]
    return outputs, {"train": report, "seconds_before": before}
