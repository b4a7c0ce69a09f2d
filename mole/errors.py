"""The errors a person can cause, and the warnings they should read."""

import difflib
from collections.abc import Iterable
from typing import Any

MOST_MISTAKES = 50
"""That one message lists."""


class MoleError(Exception):
    """Something the user can mend; the message says where, what, what is legal and what to do."""


class ConfigError(MoleError):
    """One or more mistakes in the configuration, all of them listed."""

    def __init__(self, mistakes: list[str], where: str = "configuration") -> None:
        self.mistakes = mistakes
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''} in the {where}"
        shown = [f"  {mistake}" for mistake in mistakes[:MOST_MISTAKES]]
        more = [f"  and {len(mistakes) - len(shown)} more"] * (len(mistakes) > len(shown))
        super().__init__("\n".join([count, *shown, *more]))


class ChoiceError(MoleError, ValueError):
    """A name that is none of the legal ones."""


class CorruptFileError(MoleError):
    """A file is truncated, altered or not what its name says."""


class StoppedError(BaseException):
    """A signal asked the process to stop; what was done is on disk."""

    def __init__(self, signal: int) -> None:
        self.code = 128 + signal
        super().__init__(f"stopped by signal {signal}")


class GenerationWarning(UserWarning):
    """Some generated networks are no networks: they have NaN or infinite weights."""


class HarvestWarning(UserWarning):
    """A callback keeps less of a training than was asked for, or nothing; the training goes on."""


class PromptWarning(UserWarning):
    """A prompt lies outside what the generator was trained on."""


class SymmetryWarning(UserWarning):
    """Less is known to be interchangeable in a network than it might be."""


class VectorisationWarning(UserWarning):
    """A population is trained one network at a time, because its network cannot be batched."""


def check_choice(name: str, value: Any, legal: Iterable[str]) -> None:
    """Refuse a name that is none of the legal ones.

    Raises:
        ChoiceError: naming the legal ones and the nearest of them.
    """
    names = list(legal)
    if isinstance(value, str) and value in names:
        return
    near = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ChoiceError(f"{name} is {value!r}; legal: {', '.join(names)}{hint}")
