"""MNIST and Fashion-MNIST: `<name>.npz` from the folder `MOLE_DATA`, otherwise from OpenML."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mole.config import TaskConfig
from mole.errors import CorruptFileError, MoleError
from mole.tasks.task import Split, Task

PROMPT = 2000
"""Images taken off the end of the published training images."""

OPENML_NAMES = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}


def load(config: TaskConfig) -> Task:
    """58,000 training, 2,000 prompt and 10,000 test images of 28x28, scaled to 0..1.

    Raises:
        MoleError: neither source has the data.
    """
    folder = os.environ.get("MOLE_DATA")
    path = Path(folder) / f"{config.name}.npz" if folder else None
    arrays = _read(path) if path is not None and path.exists() else _fetch(config.name)
    images, labels, test_images, test_labels = arrays
    cut = len(labels) - PROMPT
    splits = [(images[:cut], labels[:cut]), (images[cut:], labels[cut:]), (test_images, test_labels)]
    return Task(config, *(_split(x, y) for x, y in splits), classes=10)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    return Split(torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64)))


def _read(path: Path) -> tuple[np.ndarray, ...]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = tuple(file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise CorruptFileError(f"{path}: not an archive of x_train, y_train, x_test, y_test ({error})") from None
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels) or len(labels) <= PROMPT or images[0].size != 784:
            raise CorruptFileError(
                f"{path}: found images {images.shape} and labels {labels.shape}; "
                f"legal is more than {PROMPT} images of 28x28 with a label each"
            )
    return arrays


def _fetch(name: str) -> tuple[np.ndarray, ...]:
    from sklearn.datasets import fetch_openml

    try:
        data: Any = fetch_openml(OPENML_NAMES[name], version=1, as_frame=False, parser="liac-arff")
    except Exception as error:  # any failure of the network or of the server ends here
        raise MoleError(
            f"{name}: not found in MOLE_DATA and not to be had from OpenML ({type(error).__name__}: {error}); "
            f"put {name}.npz (x_train, y_train, x_test, y_test) into a folder and set MOLE_DATA to it"
        ) from error
    images, labels = data.data.reshape(-1, 28, 28), data.target.astype(np.int64)
    return images[:60000], labels[:60000], images[60000:], labels[60000:]
