"""The command line: the only room that prints and exits.

Nothing here imports torch before the input has been found good.
"""

import errno
import logging
import sys
import warnings
from collections.abc import Sequence

from mole.cli.commands import COMMANDS, run_command
from mole.cli.job import DESCRIPTION, parse, run_job
from mole.errors import ConfigError, MoleError

__all__ = ["main", "parse"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a fault, 2 a mistake in the input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        sys.exit(_main(arguments))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command continues", file=sys.stderr)
        sys.exit(130)
    except MoleError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that, or choose another folder,"
        what = f"{error.filename or 'writing'}: {error.strerror or error}"
        print(f"error: {what}; what is finished is kept: {advice} and give the same command again", file=sys.stderr)
    except Exception as error:
        if "No space left" not in str(error):  # safetensors reports a full disk in its own class
            raise
        print(f"error: {error}; make room and give the same command again", file=sys.stderr)
    sys.exit(1)


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments)
    if any(argument in ("--help", "-h") for argument in arguments):
        print(DESCRIPTION, end="")
        return 0
    return run_job(arguments)
