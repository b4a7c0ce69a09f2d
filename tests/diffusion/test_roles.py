import pytest
import torch

from mole.diffusion.roles import Roles


@pytest.mark.parametrize(("tokens", "roles"), [(6, 6), (3, 8), (12, 4)])
def test_every_token_has_one_role_and_no_role_too_many_tokens(tokens: int, roles: int) -> None:
    torch.manual_seed(0)
    shares = Roles(roles, 16).double().assigned(torch.randn(5, tokens, 16).double())
    assert torch.allclose(shares.sum(2), torch.ones(5, tokens).double())
    assert float(shares.sum(1).max()) < max(1.0, tokens / roles) * 1.35


def test_two_tokens_that_want_one_role_are_given_two() -> None:
    layer = Roles(2, 3)
    with torch.no_grad():
        layer.keys.copy_(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
        layer.ask.weight.copy_(torch.eye(3))
        layer.sharpness.fill_(2.0)
        more, less = torch.tensor([2.0, -1.0, -1.0]), torch.tensor([1.0, 0.0, -1.0])  # both turned towards the first
        alone, both = layer.assigned(less[None, None]), layer.assigned(torch.stack([more, less])[None])[0]
        alike = layer.assigned(torch.stack([less, less])[None])
    assert float(alone[0, 0, 0]) > 0.9
    assert both.argmax(1).tolist() == [0, 1] and float(both.max(1).values.min()) > 0.6
    assert torch.allclose(alike, torch.full((1, 2, 2), 0.5), atol=0.02)


def test_permuted_tokens_have_permuted_roles() -> None:
    torch.manual_seed(0)
    layer, x, order = Roles(7, 8).double(), torch.randn(2, 7, 8).double(), torch.randperm(7)
    assert float((layer(x[:, order]) - layer(x)[:, order]).abs().max()) < 1e-12
