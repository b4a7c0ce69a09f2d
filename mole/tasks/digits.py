"""The scikit-learn digits: 1,797 images of 8x8, bundled, nothing is downloaded."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mole.config import TaskConfig
from mole.tasks.task import Split, Task

TRAIN, PROMPT = 1200, 300
"""Images in the first two splits; the other 297 are the test split."""


def load(config: TaskConfig) -> Task:
    """1,200 training, 300 prompt and 297 test images, stratified, always the same ones."""
    data: Any = load_digits()
    images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    train, rest = train_test_split(np.arange(len(labels)), train_size=TRAIN, stratify=labels, random_state=0)
    prompt, test = train_test_split(rest, train_size=PROMPT, stratify=labels[rest], random_state=0)
    splits = (Split(torch.from_numpy(images[i]), torch.from_numpy(labels[i])) for i in (train, prompt, test))
    return Task(config, *splits, classes=10)
