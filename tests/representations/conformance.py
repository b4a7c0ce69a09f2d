"""What every view must hold; a new one calls `conforms` with itself."""

import torch

from mole.representations import View


def conforms(view: View) -> None:
    """Every scalar is owned once, comes back bit for bit, and padding does not leak."""
    size = view.spec.size
    owned = [kind.places[kind.owned] for kind in view.nodes] + [kind.places.flatten() for kind in view.edges]
    assert torch.cat(owned).sort().values.tolist() == list(range(size))
    for kind, mask in zip(view.nodes, view.masks, strict=True):
        assert torch.equal(mask, kind.places >= 0) and not bool((kind.owned & ~mask).any())
    for kind in view.edges:
        source, target = len(view.nodes[kind.source].places), len(view.nodes[kind.target].places)
        assert kind.ends.shape == (2, len(kind.places)) and bool((kind.ends >= 0).all())
        assert bool((kind.ends[0] < source).all()) and bool((kind.ends[1] < target).all())
        if kind.complete:
            assert len(kind.places) == source * target == len(set(map(tuple, kind.ends.T.tolist())))
    flat = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=view.spec.dtype)
    flat[0, 0], flat[1, -1], flat[2, size // 2] = float("nan"), -0.0, float("inf")
    tokens = view.encode(flat)
    bits = torch.int64 if flat.dtype == torch.float64 else torch.int32
    assert torch.equal(view.decode(tokens).view(bits), flat.view(bits))
    for kind, values in zip(view.nodes, tokens.nodes, strict=True):
        assert bool((values[:, kind.places < 0] == 0).all())
        values[:, ~kind.owned] = 7.0  # neither padding nor context reaches the weights
    assert torch.equal(view.decode(tokens).view(bits), flat.view(bits))
