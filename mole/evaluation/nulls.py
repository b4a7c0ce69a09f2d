"""Null models: what a generator must beat to have learned anything (Zeng et al. 2025).

Dimensions: N networks, M training networks, P parameters.
"""

import torch
from torch import Tensor

from mole.evaluation.novelty import PermutationDistance

NULLS = ("mean_of_16_aligned", "gaussian", "pca_gaussian", "noise", "nearest_prompt_retrieval", "start")
"""Every null model, by name."""

ALIGNED = 512
"""Training networks that Gaussians are fitted to."""


def null_models(
    distance: PermutationDistance,
    starts: Tensor,
    final: Tensor,
    nearest: Tensor,
    *,
    noise_distance: float,
    seed: int,
    groups: Tensor | None = None,
) -> dict[str, Tensor]:
    """As many networks of each null model as there are starts.

    Args:
        distance: of the network family.
        starts: (N, P).
        final: (M, P), the training networks at the end of their training.
        nearest: (N, P), the checkpoints whose loss lies nearest to the prompt.
        noise_distance: how far `noise` moves a network, in the units of `distance`.
        seed: of the random choices.
        groups: (N, 16, P), which training networks are averaged for each start; random ones by default.

    Returns:
        `mean_of_16_aligned`: means of 16 training networks, their neurons aligned to the first;
        `gaussian`: every weight from a Gaussian of its own, fitted to the training networks aligned to one of them;
        `pca_gaussian`: the same for the coordinates of their principal components, as many as there are networks, at
        most 256;
        `noise`: training networks plus Gaussian noise of a fixed length, the novelty of the generated ones;
        `nearest_prompt_retrieval`: the checkpoints whose loss lies nearest to the prompt;
        `start`: the start networks themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    count, size = starts.shape
    if groups is None:
        groups = torch.stack([final[pick] for pick in torch.randint(len(final), (count, 16), generator=generator)])
    means = torch.stack([distance.align(group, group[0]).mean(0) for group in groups])
    population = distance.align(final[:ALIGNED], final[0])
    mean, centred = population.mean(0), population - population.mean(0)
    _, spectrum, basis = torch.linalg.svd(centred, full_matrices=False)
    rank = min(256, len(spectrum))
    codes = torch.randn(count, rank, generator=generator) * spectrum[:rank] / len(population) ** 0.5
    noise = torch.randn(count, size, generator=generator)
    noise *= noise_distance / noise.norm(dim=1, keepdim=True)
    return {
        "mean_of_16_aligned": means,
        "gaussian": mean + centred.std(0, correction=0) * torch.randn(count, size, generator=generator),
        "pca_gaussian": mean + codes @ basis[:rank],
        "noise": final[torch.randint(len(final), (count,), generator=generator)] + noise,
        "nearest_prompt_retrieval": nearest,
        "start": starts,
    }
