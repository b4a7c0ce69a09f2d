import torch

from mole.diffusion.roles import Roles, ranks


def given(roles: int, numbers: list[float]) -> list[int]:
    """Which role each token is given."""
    layer = Roles(roles, 1)
    with torch.no_grad():
        layer.values.copy_(torch.arange(roles)[:, None])
    return layer(ranks(torch.tensor([numbers]), torch.zeros(1, len(numbers))))[0, :, 0].int().tolist()


def test_tokens_have_the_roles_of_their_ranks() -> None:
    assert given(3, [0.5, -1.0, 7.0]) == [1, 0, 2]
    assert given(6, [0.5, -1.0, 7.0]) == [3, 1, 5]  # fewer tokens than roles spread over them
    assert given(2, [4.0, 1.0, 3.0, 2.0]) == [1, 0, 1, 0]  # of more tokens, neighbours share one
    assert given(1, [4.0, 1.0]) == [0, 0]


def test_every_token_of_as_many_has_a_role_of_its_own() -> None:
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert sorted(given(64, numbers.tolist())) == list(range(64))


def test_equal_numbers_are_ranked_by_others_and_no_others_move_numbers_that_differ() -> None:
    numbers, others = torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[3.0, 4.0, 1.0, 2.0]])
    assert ranks(numbers, others).tolist() == [[3, 1, 2, 0]]
    near = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    noises = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ranks(near, noises[0]), ranks(near, noises[1]))
