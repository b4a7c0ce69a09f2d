"""The networks of neuralRank (Desai et al.): their images, their layers, their training, and what they transfer."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mole.config.sections import Count, Natural, Positive, Section
from mole.errors import MoleError
from mole.files import replacing
from mole.rank import see
from mole.seeding import Seeded, derived

ARCHIVES = {"M": "mnist", "F": "fashion_mnist", "C": "cifar10"}
LABELS = {"10": range(10), "04": range(5), "59": range(5, 10)}
NINE = [f"{letter}{part}" for letter in ARCHIVES for part in LABELS]


class Settings(Section):
    """How much is trained and judged: `configs/neuralrank.yaml`."""

    seed: Natural = 0
    steps: Count = 1200
    """Of Adam, the same for every network."""
    batch: Count = 100
    learning_rate: Positive = 1e-3
    components: Count = 10
    """Principal components that scores are of."""
    examples: Count = 5000
    """Training images of the target that a new last layer is fitted to."""
    probe_steps: Count = 300
    """Of Adam, for that layer."""
    layer_examples: Count = 1000
    """Test images of the target that all layers are scored on."""

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Of a YAML file."""
        return cls.model_validate(yaml.safe_load(path.read_text()))


CONFIG = Path(__file__).parent.parent / "configs" / "neuralrank.yaml"
TINY = Settings(steps=2, examples=60, probe_steps=2, layer_examples=60)
"""For a walk through with random images."""


class Images:
    """The three data sets as 28x28 grey images, by letter and split."""

    def __init__(self, *, tiny: bool) -> None:
        self.tiny = tiny
        self.known: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def whole(self, letter: str, split: str) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 28, 28) in 0..1 and labels."""
        if (letter, split) not in self.known:
            self.known[letter, split] = self._read(letter, split)
        return self.known[letter, split]

    def _read(self, letter: str, split: str) -> tuple[Tensor, Tensor]:
        if self.tiny:
            generator = torch.Generator().manual_seed(derived(f"{letter} {split}", 0))
            labels = torch.arange(200) % 10
            return torch.rand(200, 1, 28, 28, generator=generator) * (1 + labels[:, None, None, None]) / 10, labels
        root = os.environ.get("MOLE_DATA")
        if not root:
            raise MoleError("MOLE_DATA is not set; it names the folder of mnist.npz, fashion_mnist.npz and cifar10.npz")
        with np.load(Path(root) / f"{ARCHIVES[letter]}.npz") as found:
            images = torch.from_numpy(found[f"x_{split}"]).float() / 255
            labels = torch.from_numpy(found[f"y_{split}"].astype(np.int64)).flatten()
        if images.ndim == 4:  # (n, 32, 32, 3), to grey by the weights of ITU-R 601
            grey = (images @ torch.tensor([0.299, 0.587, 0.114]))[:, None]
            return F.interpolate(grey, size=(28, 28), mode="bilinear", antialias=True), labels
        return images[:, None], labels

    def part(self, name: str, split: str) -> tuple[Tensor, Tensor]:
        """`M04`: the images of labels 0 to 4, numbered from 0."""
        images, labels = self.whole(name[0], split)
        wanted = LABELS[name[1:3]]
        there = (labels >= wanted.start) & (labels < wanted.stop)
        return images[there], labels[there] - wanted.start


def build(name: str) -> nn.Sequential:
    """The network of Figure 1, after the TensorFlow tutorial; `-lite` has one convolution, `-512` half of the units."""
    units, classes = 512 if name.endswith("-512") else 1024, len(LABELS[name[1:3]])
    parts: list[nn.Module] = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    width = 32 * 14 * 14
    if not name.endswith("-lite"):
        parts += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        width = 64 * 7 * 7
    dense = [nn.Flatten(), nn.Linear(width, units), nn.ReLU(), nn.Dropout(0.4), nn.Linear(units, classes)]
    return nn.Sequential(*parts, *dense)


def trained(name: str, data: Images, folder: Path, settings: Settings) -> nn.Sequential:
    """From the folder, or trained by Adam and kept there; initialised as TensorFlow does (Glorot & Bengio 2010, no
    bias), in which the paper's networks were made."""
    recipe = f"seed{settings.seed}-{settings.steps}x{settings.batch}-{settings.learning_rate:g}" + "-tiny" * data.tiny
    path = folder / f"{name}-{recipe}.safetensors"
    with Seeded(derived(f"neuralrank {name}", settings.seed)):
        network = build(name)
        if path.is_file():
            network.load_state_dict(load_file(path))
            return network.eval()
        images, labels = data.part(name, "train")
        for parameter in network.parameters():
            (nn.init.xavier_uniform_ if parameter.ndim > 1 else nn.init.zeros_)(parameter)
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
        for _ in range(settings.steps):
            index = torch.randint(len(images), (settings.batch,))
            optimizer.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(network.state_dict(), temporary)
    return network.eval()


def features(network: nn.Module, images: Tensor) -> Tensor:
    return next(iter(see(network, images.split(100)).features.values()))


def transfer_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], settings: Settings, seed: int
) -> float:
    """Of a new last layer, fitted to features (n, D) by Adam, everything else frozen."""
    with Seeded(derived("new last layer", seed)):
        layer = nn.Linear(train[0].shape[1], int(train[1].max()) + 1)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        for _ in range(settings.probe_steps):
            index = torch.randint(len(train[0]), (settings.batch,))
            optimizer.zero_grad()
            F.cross_entropy(layer(train[0][index]), train[1][index]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((layer(test[0]).argmax(1) == test[1]).float().mean())
