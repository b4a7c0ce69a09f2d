"""The command line: the only room that prints and exits.

Nothing here imports torch before the input has been found good.
"""

import difflib
import errno
import logging
import sys
import warnings
from collections.abc import Sequence

from mole.cli.commands import COMMANDS, run_command
from mole.cli.job import parse, run_job
from mole.errors import ConfigError, MoleError, StoppedError
from mole.reporting import printable
from mole.terminal import steady_streams

__all__ = ["main", "parse"]

OVERVIEW = """\
MOLE: learn from checkpoint histories, generate networks in one pass.

usage: mole COMMAND [...]

  mole train [CONFIG.yaml ...]      harvest, train a generator, sample, evaluate, rank (python train.py is the same)
  mole zoo show FOLDER              what is in a zoo of checkpoint histories
  mole zoo verify FOLDER            read every byte of a zoo; exit 1 if one is not as written
  mole import PATH --into FOLDER    take checkpoint files into a zoo
  mole rank PATH ... --data DATA    order networks by how well they would serve data

  mole COMMAND --help               more about one command
  mole --version                    which code this is
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a fault, 2 a mistake in the input, 130 interrupted, 143 terminated."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    steady_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
    try:
        sys.exit(_main(arguments))
    except ConfigError as error:
        _tell(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, StoppedError) as stop:
        _tell("\nstopped; what is finished is kept, and the same command continues")
        sys.exit(stop.code if isinstance(stop, StoppedError) else 130)
    except MoleError as error:
        _tell(f"error: {error}")
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that, or choose another folder,"
        what = f"{error.filename or 'writing'}: {error.strerror or error}"
        _tell(f"error: {what}; what is finished is kept: {advice} and give the same command again")
    except MemoryError:
        _tell("error: not enough memory; what is finished is kept: lower task.width, generator.width or "
              "train.batch_size, or run on a larger machine")  # fmt: skip
    sys.exit(1)


def _tell(text: str) -> None:
    """A message for a person, to standard error."""
    print(printable(text), file=sys.stderr)


def _main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(OVERVIEW, end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from mole.revision import revision

        print(revision())
        return 0
    if command == "train":
        return run_job(rest)
    if command in COMMANDS:
        return run_command(arguments)
    legal = ("train", *COMMANDS)
    near = difflib.get_close_matches(command, legal, 1)
    hint = f"; did you mean mole {near[0]}?" if near else ""
    if command.startswith("-") or command.endswith((".yaml", ".yml")):
        hint = f"; did you mean mole train {command} ...?"
    raise ConfigError([f"command line: no command {command!r}; legal: {', '.join(legal)}{hint}"], "command line")
