"""Null models: what a generator must beat to have learned anything (Zeng et al. 2025).

Dimensions: N networks, M training networks, P parameters.
"""

import torch
from torch import Tensor

from mole.evaluation.novelty import PermutationDistance


def null_models(
    distance: PermutationDistance,
    starts: Tensor,
    final: Tensor,
    nearest: Tensor,
    *,
    noise_distance: float,
    seed: int,
) -> dict[str, Tensor]:
    """As many networks of each null model as there are starts.

    Args:
        distance: of the network family.
        starts: (N, P).
        final: (M, P), the training networks at the end of their training.
        nearest: (N, P), the checkpoints whose loss lies nearest to the prompt.
        noise_distance: how far `noise` moves a network, in the units of `distance`.
        seed: of the random choices.

    Returns:
        `mean_of_16_aligned`: means of 16 training networks, their neurons aligned to the first;
        `noise`: training networks plus Gaussian noise of a fixed length, the novelty of the generated ones;
        `nearest_prompt_retrieval`: the checkpoints whose loss lies nearest to the prompt;
        `start`: the start networks themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    count, size = starts.shape
    picks = torch.randint(len(final), (count, 16), generator=generator)
    means = torch.stack([distance.align(final[pick], final[pick[0]]).mean(0) for pick in picks])
    noise = torch.randn(count, size, generator=generator)
    noise *= noise_distance / noise.norm(dim=1, keepdim=True)
    return {
        "mean_of_16_aligned": means,
        "noise": final[torch.randint(len(final), (count,), generator=generator)] + noise,
        "nearest_prompt_retrieval": nearest,
        "start": starts,
    }
