"""Stage 3: generate networks and write down where each came from."""

import torch

from mole.evaluation.judge import examples
from mole.evaluation.parts import without_nan
from mole.evaluation.sound import mean, measure_sound
from mole.files import remove
from mole.pipeline.current import Run
from mole.stages import Work


def sample(current: Run) -> Work:
    """Generate networks from held-out starts, one file each, each with its record in the ledger."""
    settings, folder = current.config.sample, current.folder
    heldout, task = current.own_heldout, current.task
    first = current.starts(settings.networks)
    starts, seeds = heldout.read(first), heldout.column("seed")[first.numpy()].tolist()
    support = None
    if current.config.generator.data:
        support = examples(task, seeds, current.config.evaluate.support_images, current.config.seed)
    with current.reporter.stage("sample", settings.networks, "networks") as advance:
        samples = current.generator.sample(
            target_loss=settings.target_loss, n=len(first), seed=current.config.seed,
            starts=starts, support=support, evaluations=settings.evaluations, guidance=settings.guidance,
        )  # fmt: skip
        sound = samples.flat.isfinite().all(1).tolist()
        names = [f"{index:05d}.safetensors" for index, is_sound in enumerate(sound) if is_sound]
        chosen = [network for network, is_sound in zip(samples, sound, strict=True) if is_sound]
        seeds = [seed for seed, is_sound in zip(seeds, sound, strict=True) if is_sound]
        for stale in folder.samples.glob("[0-9][0-9][0-9][0-9][0-9].safetensors"):
            if stale.name not in names:
                remove(stale)
        for done, (name, network) in enumerate(zip(names, chosen, strict=True), 1):
            network.save(folder.samples / name)
            advance(done)
    records = []
    for name, record, seed in zip(names, (network.provenance for network in chosen), seeds, strict=True):
        start = {**record["start"], "kind": "held-out run", "seed": seed, "step": 0}
        records.append({"kind": "entity", "type": "network", "file": f"samples/{name}", **record, "start": start})
    current.ledger.append(records)
    flat = samples.flat[torch.tensor(sound)].to(current.device)
    measured = measure_sound(task, flat, "prompt", seeds) if chosen else {}
    target = samples.provenance[0]["prompt"]["target_loss"]
    values = {f"sample/prompt_{name}_mean": mean(column) for name, column in measured.items()} | {
        "sample/target_loss": target
    }
    current.log("sample", 0, values)
    report = {
        "networks": len(chosen),
        "not_finite": len(samples) - len(chosen),
        "target_loss": target,
        "network_evaluations": samples.network_evaluations,
    }
    report |= {f"prompt_split_{name}_mean": mean(column) for name, column in measured.items()}
    return Work([folder.samples / name for name in names], {"sample": without_nan(report)}, records)
