"""The errors a person can cause, and the warnings they should read."""


class MoleError(Exception):
    """Something the user can mend; the message says where, what, what is legal and what to do."""


class ConfigError(MoleError):
    """One or more mistakes in the configuration, all of them listed."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''} in the configuration"
        super().__init__("\n".join([count, *(f"  {mistake}" for mistake in mistakes)]))


class CorruptFileError(MoleError):
    """A file is truncated, altered or not what its name says."""


class PromptWarning(UserWarning):
    """A prompt lies outside what the generator was trained on."""


class SymmetryWarning(UserWarning):
    """Less is known to be interchangeable in a network than it might be."""


class VectorisationWarning(UserWarning):
    """A population is trained one network at a time, because its network cannot be batched."""
