"""The scikit-learn digits: 1,797 images of 8x8, bundled, nothing is downloaded."""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from mole.config import TaskConfig
from mole.tasks.supervised import Classification
from mole.tasks.tabular import split_rows

TRAIN, PROMPT = 1200, 300
"""Images in the first two splits; the other 297 are the test split."""


def load(config: TaskConfig) -> Classification:
    """1,200 training, 300 prompt and 297 test images, stratified, always the same ones."""
    data: Any = load_digits()
    images = (data.data / 16).astype(np.float32)
    return Classification(config, *split_rows(images, data.target, TRAIN, PROMPT), classes=10)
