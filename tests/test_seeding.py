import torch

from mole.config import SubtaskConfig
from mole.seeding import derived, stream
from mole.tasks import Architecture
from mole.tasks.subtasks import draw


def test_pytorch_reads_the_lowest_bits_of_a_seed_only_which_is_why_seeds_are_derived() -> None:
    one, other = (torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (7, 2**40 + 7))
    assert torch.equal(one, other)


def test_purposes_and_numbers_draw_different_numbers() -> None:
    asked = [(purpose, *numbers) for purpose in ("noise", "fresh start", "sub-task", "data order")
             for numbers in ((0, 1), (1, 0), (0, 1, 0), (2**40, 1))]  # fmt: skip
    drawn = {tuple(torch.randn(3, generator=stream(*one)).tolist()) for one in asked}
    assert len(drawn) == len(asked)
    assert derived("noise", 3) == derived("noise", 3) < 2**32
    assert len({derived("noise", i) for i in range(20_000)}) > 19_990


def test_a_subtask_cannot_be_read_off_the_start_network_of_its_run() -> None:
    """Were both drawn from one stream, one number of the start would be the angle."""
    seeds = range(200)
    subtasks = draw(SubtaskConfig(labels=[4, 10], rename=True, rotate=90, pixels=0.5), seeds, classes=10, numbers=64)
    build = Architecture(kind="mlp", widths=[64, 16, 10]).build
    starts = torch.stack([torch.cat([p.detach().flatten() for p in build(seed).parameters()]) for seed in seeds])
    for known in (subtasks.angles, subtasks.seen.float().mean(1), (subtasks.names >= 0).float().mean(1)):
        table = torch.corrcoef(torch.cat([known[:, None], starts], 1).T)[0, 1:]
        assert float(table.abs().max()) < 0.35  # of 1,210 chance correlations of 200 pairs
