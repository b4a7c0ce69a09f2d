"""MNIST, Fashion-MNIST and CIFAR-10: `<name>.npz` from the folder `MOLE_DATA`, otherwise from OpenML."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mole.config import TaskConfig
from mole.errors import CorruptFileError, MoleError
from mole.reading.tensors import read_npz
from mole.tasks.supervised import Classification, Split


@dataclass(frozen=True)
class Archive:
    """What is known of one data set."""

    openml: str
    images: int
    """Training images; the test images follow them in OpenML's file."""
    shape: tuple[int, ...]
    """Of one image in the archive."""
    prompt: int
    """Images taken off the end of the training images."""
    mean: tuple[float, ...]
    """Per channel, in units of 0..255."""
    std: tuple[float, ...]


ARCHIVES = {  # means and deviations are those of the released code of Peebles et al. 2022, in its order
    "mnist": Archive("mnist_784", 60_000, (28, 28), 2_000, (0.1307 * 255,), (0.3081 * 255,)),
    "fashion_mnist": Archive("Fashion-MNIST", 60_000, (28, 28), 2_000, (0.2860 * 255,), (0.3530 * 255,)),
    "cifar10": Archive("CIFAR_10", 50_000, (32, 32, 3), 2_000, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
}


def load(config: TaskConfig) -> Classification:
    """58,000 (CIFAR-10: 48,000) training, 2,000 prompt and 10,000 test images.

    Raises:
        MoleError: neither source has the data.
    """
    archive = ARCHIVES[config.name]
    folder = os.environ.get("MOLE_DATA")
    path = Path(folder) / f"{config.name}.npz" if folder else None
    images, labels, test_images, test_labels = (
        _read(path, archive) if path is not None and path.exists() else _fetch(config.name, archive)
    )
    cut = len(labels) - archive.prompt
    splits = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:]), (test_images, test_labels)]
    train, prompt, test = (_split(x, y, archive) for x, y in splits)
    return Classification(config, train, prompt, test, classes=10, augmented=len(archive.shape) == 3)


def _split(images: np.ndarray, labels: np.ndarray, archive: Archive) -> Split:
    """Rows of numbers, or (M, C, H, W) for colour images, of zero mean and unit deviation."""
    rows = images.reshape(len(images), -1, len(archive.mean)).astype(np.float32)
    rows = (rows - np.array(archive.mean, np.float32)) / np.array(archive.std, np.float32)
    if len(archive.shape) == 3:
        height, width, channels = archive.shape
        rows = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, channels, height, width)
    shaped = rows if rows.ndim == 4 else rows.reshape(len(rows), -1)
    return Split(torch.from_numpy(shaped), torch.from_numpy(labels.astype(np.int64)))


def _read(path: Path, archive: Archive) -> tuple[np.ndarray, ...]:
    names = ("x_train", "y_train", "x_test", "y_test")
    found = read_npz(path, names)
    if missing := [name for name in names if name not in found]:
        raise CorruptFileError(f"{path}: not an archive of {', '.join(names)} ({', '.join(missing)} missing)")
    arrays = tuple(found[name] for name in names)
    for images, labels in (arrays[:2], arrays[2:]):
        enough = len(labels) > archive.prompt and labels.ndim == 1 and labels.max() < 10
        if not enough or images.shape != (len(labels), *archive.shape) or images.dtype != np.uint8:
            raise CorruptFileError(
                f"{path}: found images {images.shape} {images.dtype} and labels {labels.shape}; legal is more than "
                f"{archive.prompt} uint8 images of {'x'.join(map(str, archive.shape))} with a label of 0 to 9 each"
            )
    return arrays


def _fetch(name: str, archive: Archive) -> tuple[np.ndarray, ...]:
    from sklearn.datasets import fetch_openml

    try:
        data: Any = fetch_openml(archive.openml, version=1, as_frame=False, parser="liac-arff")
    except Exception as error:  # any failure of the network or of the server ends here
        raise MoleError(
            f"{name}: not found in MOLE_DATA and not to be had from OpenML ({type(error).__name__}: {error}); "
            f"put {name}.npz (x_train, y_train, x_test, y_test) into a folder and set MOLE_DATA to it"
        ) from error
    images = data.data.astype(np.uint8)
    if len(archive.shape) == 3:  # OpenML stores one plane of colour after the other
        height, width, channels = archive.shape
        images = images.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    images, labels = images.reshape(-1, *archive.shape), data.target.astype(np.int64)
    cut = archive.images
    return images[:cut], labels[:cut], images[cut:], labels[cut:]
