"""The small tables that scikit-learn brings along: iris, wine and breast_cancer."""

from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split

from mole.config import TaskConfig
from mole.tasks.supervised import Classification, Split

LOADERS = {
    "iris": datasets.load_iris, "wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer,
}  # fmt: skip


def load(config: TaskConfig) -> Classification:
    """60 % training, 20 % prompt and 20 % test rows, stratified; columns normalised by the training rows."""
    data: Any = LOADERS[config.name]()
    rows, size = data.data.astype(np.float64), len(data.target)
    train, prompt, test = split_rows(rows, data.target, round(0.6 * size), round(0.2 * size))
    mean, std = train.images.mean(0), train.images.std(0)
    parts = (Split(((s.images - mean) / std).float(), s.labels) for s in (train, prompt, test))
    return Classification(config, *parts, classes=len(data.target_names))


def split_rows(rows: np.ndarray, labels: np.ndarray, train: int, prompt: int) -> tuple[Split, Split, Split]:
    """`train` rows, `prompt` rows and the rest, stratified, always the same ones."""
    labels = labels.astype(np.int64)
    first, rest = train_test_split(np.arange(len(labels)), train_size=train, stratify=labels, random_state=0)
    second, third = train_test_split(rest, train_size=prompt, stratify=labels[rest], random_state=0)
    one, two, three = (Split(torch.from_numpy(rows[i]), torch.from_numpy(labels[i])) for i in (first, second, third))
    return one, two, three
