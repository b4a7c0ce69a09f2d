"""The commands beside the main job: looking into zoos, taking checkpoints into one, ranking."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mole.cli.rank import add_parser, run_rank
from mole.errors import ConfigError, MoleError
from mole.reporting import printable

COMMANDS = ("zoo", "import", "rank")


class _Parser(argparse.ArgumentParser):
    """Says its mistakes as the rest of the command line does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"command line: {message}; {' '.join(self.format_usage().split())}"], "command line")


def run_command(arguments: Sequence[str]) -> int:
    """Run `zoo show`, `zoo verify`, `import` or `rank`; returns the exit code.

    Raises:
        ConfigError: the arguments are wrong.
        MoleError: there is no zoo, or it cannot be read.
    """
    options = _parser().parse_args(list(arguments))
    if options.command == "import":
        return _import(options)
    if options.command == "rank":
        return run_rank(options)
    return _show(options.path) if options.action == "show" else _verify(options.path)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mole", description="Zoos of checkpoint histories, and ranking networks.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    zoo = commands.add_parser("zoo", help="look into a zoo")
    actions = zoo.add_subparsers(dest="action", required=True, parser_class=_Parser)
    for action, text in (("show", "what is in it"), ("verify", "read every byte; exit 1 if one is not as written")):
        actions.add_parser(action, help=text).add_argument("path", type=Path)
    add_parser(commands)
    taken = commands.add_parser("import", help="take checkpoint files into a zoo")
    taken.add_argument("path", type=Path, help="a file, or a folder that is searched through")
    taken.add_argument("--into", type=Path, required=True, metavar="ZOO")
    taken.add_argument("--metric", help="the one that generators are conditioned on")
    taken.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    return parser


def _show(path: Path) -> int:
    from mole.checkpoints import Zoo

    print(printable(repr(Zoo(path))))
    return 0


def _verify(path: Path) -> int:
    from mole.checkpoints import Zoo, verify
    from mole.checkpoints.format import shards

    faults = verify(path)
    if not faults and shards(path):
        try:
            faults = Zoo(path).faults()
        except MoleError as error:
            faults = [str(error)]
    for fault in faults:
        print(printable(fault))
    outcome = f"{len(faults)} faults" if faults else "every byte as written, and every index makes sense"
    print(printable(f"{path}: {len(shards(path))} shards, {outcome}"))
    return 1 if faults else 0


def _import(options: argparse.Namespace) -> int:
    from mole.checkpoints import import_checkpoints
    from mole.checkpoints.foreign import candidates
    from mole.terminal import reporter

    total = len(candidates(options.path, options.into)) if options.path.exists() else 0
    with reporter().stage("import", total, "files") as advance:
        report = import_checkpoints(
            options.path, options.into, metric=options.metric, dtype=options.dtype,
            progress=lambda done, _: advance(done),
        )  # fmt: skip
    print(printable(str(report)))
    return 0 if report.checkpoints or report.known else 1
