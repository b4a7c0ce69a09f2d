"""How recipes are told to generators: every key as a number."""

from typing import Any

CODES: dict[str, list[str]] = {
    "optimizer": ["adam", "sgd"], "activation": ["relu", "gelu", "silu", "tanh", "selu"],
}  # fmt: skip
"""Values of the conditions that are no numbers, each by its place."""

RECIPE = ("optimizer", "activation", "learning_rate", "batch_size")
"""Keys of a recipe that generators can be told."""


def subject(condition: str) -> str:
    """What a condition is about: `loss` for `start_loss` and for `target_loss`."""
    return condition.removeprefix("start_").removeprefix("target_")


def coded(name: str, value: Any) -> float:
    """A key of a recipe as a number."""
    return float(CODES[name].index(value) if name in CODES else value)
