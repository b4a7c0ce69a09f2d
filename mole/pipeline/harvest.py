"""Stage 1: train a population and keep its histories."""

from pathlib import Path
from typing import Any

from mole.checkpoints import Header, Zoo, ZooWriter
from mole.checkpoints.backends import make_backend
from mole.checkpoints.format import belongs, read_header, read_layouts, shards
from mole.checkpoints.groups import SEEDS_PER_CONFIG, Group, plan_groups, run_name
from mole.checkpoints.layouts import VARIANTS
from mole.config import Config
from mole.diffusion.generator import versions
from mole.errors import CorruptFileError, MoleError
from mole.files import remove
from mole.pipeline.current import Run
from mole.stages import Work, harvest_recipe


def harvest(current: Run) -> Work:
    """Train a population in groups; each group is a shard that counts once it is whole.

    While streaming there is nothing to do: populations train beside the generator.
    """
    if current.config.harvest.mode == "stream":
        return Work([], {"harvest": {"mode": "stream", "runs": 0, "checkpoints": 0}, "split": _split(current)})
    config, folder = current.config, current.folder.zoo
    settings, header = config.harvest, _header(current)
    total = settings.runs + settings.heldout_runs
    groups = plan_groups(config.task, settings, config.seed, range(total))
    _empty_unless_same(folder, header)
    with ZooWriter(folder, header, "group") as writer:
        before = writer.seconds()
        _fill(current, writer, groups)
        for files in shards(folder):
            if files.name not in {group.name for group in groups}:
                writer.discard(files.name)
        seconds = writer.seconds()
    zoo = Zoo(folder)
    _ = current.zoo  # says so if nothing is left to learn from
    record = {
        "kind": "entity", "type": "zoo", "digest": zoo.digest, "runs": total, "recipe": header.recipe,
        "seeds": [config.seed * SEEDS_PER_CONFIG, config.seed * SEEDS_PER_CONFIG + total - 1],
        "layouts": sorted(zoo.layouts), "wasGeneratedBy": {"activity": "harvest", "versions": versions()},
    }  # fmt: skip
    current.ledger.append([record])
    outputs = [folder / "zoo.json", *folder.glob("layouts/[!.]*")]
    outputs += [path for files in shards(folder) for path in (files.weights, files.index)]
    seals = [files.seal for files in shards(folder)]  # which hold seconds, and differ every time
    return Work(outputs, {**_report(current, zoo, seconds), "seconds_before": before}, [record], seals)


def check_drawn(config: Config) -> None:
    """Refuse a plan in which no run draws the configuration's own network, before anything is trained.

    Raises:
        MoleError: naming what to raise.
    """
    lists = {name: getattr(config.harvest.vary, name) for name in VARIANTS}
    own = {name: getattr(config.task, name) for name, values in lists.items() if values is not None}
    if any(value not in lists[name] for name, value in own.items()):
        return  # a zoo for other uses: generators are refused elsewhere
    total = range(config.harvest.runs + config.harvest.heldout_runs)
    groups = plan_groups(config.task, config.harvest, config.seed, total) if own else []
    alike = [run for group in groups if own.items() <= group.factors.items() for run in group.runs]
    for key, runs in (("runs", range(config.harvest.runs)), ("heldout_runs", range(config.harvest.runs, 2**30))):
        if own and not any(run in runs for run in alike):
            told = ", ".join(f"{name} {value}" for name, value in own.items())
            raise MoleError(f"none of harvest.{key} {getattr(config.harvest, key)} draws the network of {told}, which "
                            f"generators are judged by; raise harvest.{key}, or vary less")  # fmt: skip


def _header(current: Run) -> Header:
    """What decides the bits of the zoo; groups decide them too, by the number of networks that train at once."""
    return Header("loss", current.config.harvest.dtype, harvest_recipe(current.config))


def _empty_unless_same(folder: Path, header: Header) -> None:
    """Remove the zoo of another configuration; this run folder holds one zoo, of its own.

    Raises:
        MoleError: a zoo that no harvest has made lies there.
    """
    try:
        found = read_header(folder)
    except MoleError:  # none, damaged, or of an earlier format
        found = header if belongs(folder, header) else None
        remove(folder / "zoo.json")
    if found is not None and "task" not in found.recipe:
        raise MoleError(
            f"{folder}: networks from elsewhere ({found.recipe.get('source', 'unknown')}) are here, which a harvest "
            "would remove; choose another --out"
        )
    if found != header:
        for name in ("zoo.json", "shards", "layouts"):
            remove(folder / name)
    try:
        read_layouts(folder)
    except CorruptFileError:
        remove(folder / "layouts")  # they follow from the task


def _fill(current: Run, writer: ZooWriter, groups: list[Group]) -> None:
    """Train the groups that are not in the zoo yet."""
    task = current.task
    for config in {group.config.model_dump_json(): group.config for group in groups}.values():
        writer.keep_layout(task.with_config(config).spec)
    missing = [group for group in groups if not writer.has(group.name, [run_name(run) for run in group.runs])]
    total, left = (sum(len(g.runs) * g.config.steps for g in part) for part in (groups, missing))
    with current.reporter.stage("harvest", total, "steps") as advance:
        advance(total - left)
        backend = make_backend(task, current.config.harvest)
        for found in backend.run(missing, lambda done: advance(total - left + done)):
            spec = task.with_config(found.group.config).spec
            found = found.only(writer.fits(spec, found.weights))
            writer.write(found.group.name, spec, found.weights, found.columns, table=found.table, seconds=found.seconds)


def _report(current: Run, zoo: Zoo, seconds: float) -> dict[str, Any]:
    training, heldout = current.zoo
    harvested = {
        "mode": "disk", "runs": zoo.runs, "diverged_runs": zoo.runs - training.runs - heldout.runs,
        "checkpoints": len(zoo),
        "parameters": max(spec.size for spec in zoo.layouts.values()), "seconds": seconds,
        "checkpoints_per_second": len(zoo) / max(seconds, 1e-9), "prompt_loss_best": float(training.loss.min()),
        "digest": zoo.digest,
    }  # fmt: skip
    return {"harvest": harvested, "split": _split(current)}


def _split(current: Run) -> dict[str, int]:
    settings = current.config.harvest
    return {"train_runs": settings.runs, "heldout_runs": settings.heldout_runs, **current.task.sizes}
