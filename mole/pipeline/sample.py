"""Stage 3: generate networks and write down where each came from."""

from mole.evaluation.judge import examples
from mole.files import remove
from mole.pipeline.current import Result, Run


def sample(current: Run) -> Result:
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
        names = [f"{index:05d}.safetensors" for index in range(len(samples))]
        for stale in folder.samples.glob("[0-9][0-9][0-9][0-9][0-9].safetensors"):
            if stale.name not in names:
                remove(stale)
        for done, (name, network) in enumerate(zip(names, samples, strict=True), 1):
            network.save(folder.samples / name)
            advance(done)
    records = []
    for name, record, seed in zip(names, samples.provenance, seeds, strict=True):
        start = {**record["start"], "kind": "held-out run", "seed": seed, "step": 0}
        records.append({"kind": "entity", "type": "network", "file": f"samples/{name}", **record, "start": start})
    current.ledger.append(records)
    measured = task.measure(samples.flat.to(current.device), "prompt", seeds)
    target = samples.provenance[0]["prompt"]["target_loss"]
    values = {
        "sample/prompt_loss_mean": float(measured["loss"].mean()),
        f"sample/prompt_{task.score}_mean": float(measured[task.score].mean()),
        "sample/target_loss": target,
    }
    current.log("sample", 0, values)
    report = {
        "networks": len(samples), "target_loss": target, "network_evaluations": samples.network_evaluations,
        "prompt_split_loss_mean": values["sample/prompt_loss_mean"],
        f"prompt_split_{task.score}_mean": values[f"sample/prompt_{task.score}_mean"],
    }  # fmt: skip
    return [folder.samples / name for name in names], {"sample": report}
