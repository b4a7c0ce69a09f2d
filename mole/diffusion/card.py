"""What is written beside a generator's weights: what it is, what it has seen, and the page that says so."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from mole.config import GeneratorConfig, TaskConfig
from mole.errors import CorruptFileError
from mole.files import value_digest
from mole.reading.guard import available_memory, in_bytes
from mole.reading.text import read_json
from mole.tasks import Architecture

FORMAT = 6


def _with_loss(ranges: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    if "loss" not in ranges:
        raise ValueError("the range of the loss is missing")
    return ranges


class Card(BaseModel):
    """What `config.json` of a generator holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: int
    denoiser: GeneratorConfig
    task: TaskConfig
    architectures: list[Architecture]
    """Networks that it was trained on; those of `task` first."""
    scales: dict[str, float]
    """Standard deviation of every tensor over the training networks, by its word."""
    ranges: Annotated[dict[str, tuple[float, float]], AfterValidator(_with_loss)]
    """Lowest and highest value of every metric in the zoo."""
    examples: int
    """Numbers per example of the data."""
    zoo: str
    """Digest of the zoo it learned from."""
    train_steps: int
    seed: int
    weights: str = ""
    """SHA-256 of `model.safetensors`."""
    digest: str = ""
    """Of everything above: the identity of the generator."""

    @property
    def architecture(self) -> Architecture:
        """The networks that it generates unless others are asked for."""
        return self.architectures[0]

    def sealed(self) -> "Card":
        """The same card with its digest."""
        return self.model_copy(update={"digest": value_digest(self.model_dump(mode="json", exclude={"digest"}))})

    def page(self) -> str:
        """The model card: a page for people, as the Hugging Face Hub shows it."""
        rows = {
            "task": f"{self.task.name}, {self.task.optimizer}, learning rate {self.task.learning_rate}, "
            f"{self.task.steps} steps",
            "networks": "; ".join(
                f"{a.kind} {'-'.join(map(str, a.widths))} {a.activation}" for a in self.architectures
            ),
            "conditions": ", ".join([*self.denoiser.conditions, *(["support set"] if self.denoiser.data else [])]),
            "seen": ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in self.ranges.items()),
            "view": f"{self.denoiser.view}, {self.denoiser.symmetry}",
            "training": f"{self.train_steps} steps, seed {self.seed}",
            "zoo": self.zoo,
            "digest": self.digest,
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return f"""---
library_name: mole
tags: [mole, weight-space-learning, diffusion]
---

# A generator of {self.task.name} networks

It draws the weights of a network in one evaluation, for what is asked of it.

| | |
|---|---|
{table}

```python
import mole

generator = mole.Generator.from_pretrained("PATH OR REPOSITORY")
networks = generator.sample(n=4)
```

Prompts outside the ranges above were never seen in training. What its networks are worth is measured on held-out
runs by `python train.py`, beside null models; see `report.json` of the run that made it.
"""


def read_card(path: Path) -> Card:
    """The card in a file.

    Raises:
        FileNotFoundError: there is none.
        CorruptFileError: it is not what was written, or of another format.
    """
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if isinstance(found, int) and found != FORMAT:
        todo = "update MOLE" if found > FORMAT else "train again"
        raise CorruptFileError(f"{path}: format {found}; this version reads {FORMAT}: {todo}")
    try:
        card = Card.model_validate(values)
        seal = value_digest({name: value for name, value in values.items() if name != "digest"})
    except ValueError as error:
        what = "; ".join(str(error).splitlines()[:3])
        raise CorruptFileError(f"{path}: no card of a generator ({what}); train again or copy it anew") from None
    if seal != card.digest:
        raise CorruptFileError(f"{path}: altered after it was written; train again or copy it anew")
    return card


BYTES_PER_PARAMETER = 512
"""Of a network that is built, traced and proved when its generator is loaded, at most."""


def check_size(card: Card, header: Mapping[str, Any], folder: Path) -> None:
    """Refuse a card that asks for more than the file beside it holds, before anything is built by it.

    Raises:
        CorruptFileError: naming the key.
    """
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    numbers, config = sum(prod(shape) for shape in shapes), card.denoiser
    limits = {"layers": len(shapes), "width": numbers, "heads": numbers, "mlp_ratio": numbers}
    if config.view in ("chunks", "latent"):
        limits |= {"chunk": numbers, "latent": numbers}
    for key, most in limits.items():
        if getattr(config, key) > most:
            raise CorruptFileError(
                f"{folder}: the card's {key} is {getattr(config, key):,}, but model.safetensors holds {len(shapes):,} "
                f"tensors of {numbers:,} numbers; train again or copy it anew"
            )
    needed = BYTES_PER_PARAMETER * sum(architecture.parameters for architecture in card.architectures)
    if needed > (free := available_memory() // 2):
        raise CorruptFileError(
            f"{folder}: the networks of its card need about {in_bytes(needed)} of memory, and {in_bytes(free)} can be "
            "used; run on a larger machine, if the card is to be trusted"
        )
