import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.checkpoints import AtRandom, ByLoss, kept_steps, population, train_population
from mole.checkpoints.groups import plan_groups, train_group
from mole.checkpoints.population import _Population
from mole.checkpoints.schedules import even_steps, schedule_for
from mole.config import HarvestConfig, TaskConfig, VaryConfig
from mole.errors import MoleError, VectorisationWarning
from mole.tasks import Architecture, Classification
from mole.tasks.supervised import DataOrder


def test_kept_steps_hold_first_and_last_and_differ() -> None:
    assert kept_steps(10, 11) == list(range(11))
    assert kept_steps(300, 2) == [0, 300]
    for steps, count in [(300, 30), (20, 8), (1000, 200), (1, 2)]:
        kept = kept_steps(steps, count)
        assert len(kept) == count and kept[0] == 0 and kept[-1] == steps
        assert all(a < b for a, b in pairwise(kept))
    with pytest.raises(ValueError, match="cannot keep 5 of 3 states"):
        kept_steps(2, 5)
    assert even_steps(300, 4) == [0, 100, 200, 300] and even_steps(3, 9) == [0, 1, 2, 3]


def with_network(toy: Classification, build: type[nn.Module] | None, **changes: object) -> Classification:
    """The toy with other settings, and with a network of another kind."""

    class Other(Architecture):
        def build(self, seed: int) -> nn.Module:
            if build is None:
                return super().build(seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build()

    class Task(Classification):
        @property
        def architecture(self) -> Architecture:
            return Other(**super().architecture.model_dump())

    config = toy.config.model_copy(update=changes)
    return Task(config, toy.train, toy.prompt, toy.test, toy.classes)


def one_by_one(task: Classification, seed: int, steps: int) -> Tensor:
    """The same training as a plain loop over a plain module."""
    network, config = task.architecture.build(seed), task.config
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
    order = DataOrder(task, seed)
    batches = [index for _ in range(10) for index in order.epoch()]
    for index in batches[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(network(task.train.images[index]), task.train.labels[index]).backward()
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
        optimizer.step()
    return task.spec.flatten(network.state_dict()).detach()


class Normed(nn.Sequential):
    """Batch norm in the middle: running statistics and a counter beside the weights."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3))


class Convolved(nn.Sequential):
    """A convolution over the five numbers; such networks run one after the other on a CPU."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 2, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
        )  # fmt: skip


class Frozen(nn.Sequential):
    """A layer that is not to be trained."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        self[0].requires_grad_(requires_grad=False)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.again.weight = self.inner.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.again(self.inner(input).tanh()).tanh())


class Assigning(nn.Module):
    """A buffer that the forward assigns anew."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * input.detach().mean(0)
        return self.layer(input - self.mean)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (Frozen, {"optimizer": "adam"}),
        (Frozen, {"optimizer": "sgd", "weight_decay": 0.01}),
        (Tied, {"optimizer": "sgd"}),
        (Assigning, {"optimizer": "sgd"}),
        (None, {"optimizer": "adam"}),
        (None, {"optimizer": "sgd", "weight_decay": 0.01}),
        (None, {"depth": 2, "activation": "tanh", "width": 3}),
        (None, {"gradient_clip": 0.05}),
        (None, {"data_fraction": 0.5}),
        (None, {"labels": None, "batch_size": 4}),
        (
            Normed,
            {"optimizer": "sgd", "learning_rate": 0.05},
        ),  # Adam would blow up the rounding of a bias before a norm,
        (Convolved, {"weight_decay": 0.01}),
    ],
    ids=[
        "frozen, adam",
        "frozen, sgd",
        "tied",
        "assigned buffer",
        "adam",
        "sgd",
        "deep",
        "clipped",
        "part",
        "small batches",
        "batch norm",
        "convolutions",
    ],
)
def test_a_population_equals_the_loop_over_its_members(
    toy: Classification, build: type[nn.Module] | None, changes: dict[str, object]
) -> None:
    task = with_network(toy, build, **changes)
    found = train_population(task, [4, 9], [0, 5, 12]).regular
    assert found.shape == (2, 3, task.spec.size)
    for row, seed in enumerate([4, 9]):
        for column, steps in enumerate([0, 5, 12]):
            torch.testing.assert_close(found[row, column], one_by_one(task, seed, steps), rtol=1e-4, atol=1e-6)


def test_convolutions_run_one_after_the_other_on_a_cpu(toy: Classification, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "vmap", None)
    assert train_population(with_network(toy, Convolved), [1, 2], [3]).weights.isfinite().all()


class Dropped(nn.Sequential):
    """Dropout at two places."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 40), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 3))


def test_a_run_does_not_depend_on_its_neighbours_not_even_with_dropout(toy: Classification) -> None:
    for build in (None, Normed, Dropped, Convolved):
        task = with_network(toy, build, optimizer="sgd", learning_rate=0.05)
        together, alone = train_population(task, [1, 2, 3], [12]), train_population(task, [2], [12])
        torch.testing.assert_close(together.weights[1], alone.weights[0], rtol=1e-4, atol=1e-6)


def test_dropout_drops_the_right_share_anew_for_every_step_and_run() -> None:
    from mole.tasks.batched import KeyedDropout, advance_keys

    layer, state = KeyedDropout(0.3, 0), {"key": torch.zeros(2, dtype=torch.int64)}
    seen = []
    for step in (0, 1):
        advance_keys(state, ["key"], torch.tensor([5, 6]), step)
        for run in (0, 1):
            layer.key = state["key"][run].clone()
            seen.append(layer(torch.ones(200, 500)))
    for mask in seen:
        assert float((mask == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
        assert float(mask.mean()) == pytest.approx(1, abs=0.02)
        assert float((mask == 0).float().mean(0).std()) == pytest.approx((0.3 * 0.7 / 200) ** 0.5, rel=0.2)
    for one, other in pairwise(seen):
        assert float(((one == 0) & (other == 0)).float().mean()) == pytest.approx(0.09, abs=0.01)
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))


def test_given_starts_are_used_and_progress_counts_network_steps(toy: Classification) -> None:
    start, told = torch.zeros(2, toy.spec.size), []
    kept = train_population(toy, [0, 1], [0, 3], initial=start, progress=told.append).regular
    assert torch.equal(kept[:, 0], start) and told == [2, 4, 6, 6]


def test_a_population_larger_than_the_cache_is_trained_in_parts(
    toy: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_population(toy, range(5), [0, 6, 12])
    monkeypatch.setattr("mole.checkpoints.population.CACHED_NUMBERS", 2 * toy.numbers_per_step)
    told: list[int] = []
    parts = train_population(toy, range(5), [0, 6, 12], progress=told.append)
    torch.testing.assert_close(parts.regular, whole.regular, rtol=1e-4, atol=1e-6)
    assert told == sorted(told) and told[-1] == 60


class Fragile(nn.Sequential):
    """A network whose function is not finite once its first weight is far from zero."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / (self[0].weight[0, 0].abs() < 100)


def test_runs_that_diverge_stop_are_recorded_and_leave_their_neighbours_alone(
    toy: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mole.checkpoints.population.CHECK_EVERY", 2)
    task = with_network(toy, Fragile, optimizer="adam")
    start = task.initial([0, 1, 2])
    start[1, 0] = 1e4
    sizes: list[int] = []
    step = _Population.step
    monkeypatch.setattr(_Population, "step", lambda self, n: (sizes.append(len(self.runs)), step(self, n))[1])
    history = train_population(task, [0, 1, 2], [0, 1, 6, 12], initial=start)
    assert history.diverged.tolist() == [False, True, False]
    assert sizes[:2] == [3, 3] and set(sizes[2:]) == {2}  # it costs no more time
    assert history.runs.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2] and bool(history.weights.isfinite().all())
    alone = train_population(task, [2], [0, 1, 6, 12], initial=start[2:])
    torch.testing.assert_close(history.weights[-4:], alone.weights, rtol=1e-4, atol=1e-6)


def test_a_population_that_diverges_as_a_whole_keeps_its_first_states(toy: Classification) -> None:
    task = toy.with_config(toy.config.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30}))
    history = train_population(task, [0, 1], [0, 60], steps=60)
    assert history.diverged.all() and history.steps.tolist() == [0, 0]


class Deciding(nn.Sequential):
    """Control flow that depends on the data, which cannot be batched."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3))

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output * 2 if output.sum().item() > 0 else output


def test_a_network_that_cannot_be_batched_is_trained_in_a_loop_with_one_warning(toy: Classification) -> None:
    task = with_network(toy, Deciding)
    with pytest.warns(VectorisationWarning) as caught:
        history = train_population(task, [4, 9], [0, 12])
    assert len(caught) == 1
    text = str(caught[0].message)
    assert re.search(
        r"cannot be batched \(.*test_population\.py:\d+ `return output \* 2 if output\.sum\(\)\.item\(\)", text
    )
    assert "one after the other" in text
    torch.testing.assert_close(history.regular[0, 1], one_by_one(task, 4, 12), rtol=1e-4, atol=1e-6)


def test_the_compiled_step_computes_the_same(toy: Classification) -> None:
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    plain, fast = (train_population(toy, [0, 1], [0, 8], compiled=c) for c in (False, True))
    torch.testing.assert_close(fast.weights, plain.weights, rtol=1e-4, atol=1e-6)


def test_random_schedules_differ_between_runs_and_depend_on_the_seed(toy: Classification) -> None:
    schedule = AtRandom([3, 4], 12, 5)
    history = train_population(toy, [3, 4], schedule)
    steps = [history.steps[history.runs == run].tolist() for run in (0, 1)]
    for kept in steps:
        assert len(kept) == 5 and kept[0] == 0 and kept[-1] == 12 and kept == sorted(set(kept))
    assert steps[0] != steps[1]
    alone = train_population(toy, [4], AtRandom([4], 12, 5))
    assert alone.steps.tolist() == steps[1]
    every = train_population(toy, [4], range(13))
    torch.testing.assert_close(alone.weights, every.weights[steps[1]], rtol=1e-4, atol=1e-6)


def test_states_are_kept_whenever_the_loss_has_fallen_by_the_factor() -> None:
    schedule, runs = ByLoss(2, 100, 4), torch.arange(2)  # thresholds at a tenth and a hundredth

    def due(step: int, losses: Sequence[float] | None) -> list[bool] | None:
        found = schedule.due(step, runs, None if losses is None else torch.tensor(losses))
        return None if found is None else found.tolist()

    assert due(0, None) == [True, True]
    assert due(1, [10.0, 10.0]) is None
    falling = [step for step in range(2, 99) if due(step, [0.0, 10.0]) == [True, False]]
    assert falling == [23, 45]  # 0.9 ** 22 is the first below 0.1; then all are used up
    assert due(100, [0.0, 10.0]) == [True, True]


@pytest.mark.parametrize("keep", ["log", "even", "random", "loss"])
def test_every_schedule_keeps_first_and_last_and_no_more_than_asked_for(toy: Classification, keep: str) -> None:
    harvest = HarvestConfig.model_validate({"checkpoints": 5, "keep": keep})
    history = train_population(toy, [0, 1], schedule_for(harvest, 12, [0, 1]))
    for run in (0, 1):
        steps = history.steps[history.runs == run].tolist()
        assert steps[0] == 0 and steps[-1] == 12 and len(steps) <= 5


def test_varied_runs_are_grouped_by_recipe_and_their_factors_recorded(toy: Classification) -> None:
    vary = VaryConfig(width=[3, 4], learning_rate=[0.01, 0.1], labels=[[0, 1], [1, 2]])
    harvest = HarvestConfig(checkpoints=3, vary=vary, group_size=4)
    groups = plan_groups(toy.config, harvest, 5, range(40))
    assert sorted(run for group in groups for run in group.runs) == list(range(40))
    assert len({str(group.factors) for group in groups}) == 8
    for group in groups:
        assert 1 <= len(group.runs) <= 4
        assert {name: getattr(group.config, name) for name in group.factors} == group.factors
        assert group.seeds == [5 * 2**20 + run for run in group.runs]
    again = plan_groups(toy.config, harvest, 5, range(40, 80))
    assert [g.factors for g in plan_groups(toy.config, harvest, 5, [7])] == [
        g.factors for g in groups if 7 in g.runs
    ]  # a run's factors are its own
    assert again[0].name == "group-00000"
    found = train_group(toy, groups[0], harvest)
    assert found.columns["run"][:4] == [f"{groups[0].runs[0]:07d}"] * 3 + [f"{groups[0].runs[1]:07d}"]
    assert found.columns["labels"] == [groups[0].factors["labels"]] * len(found.weights)
    assert found.columns["loss"].shape == found.columns["accuracy"].shape == (len(found.weights),)
    assert found.digest == train_group(toy, groups[0], harvest).digest


def test_epoch_cosine_changes_between_epochs_only(toy: Classification) -> None:
    from mole.checkpoints.population import learning_rate_at

    task = replace(toy, config=TaskConfig(schedule="epoch_cosine", learning_rate=1.0, batch_size=8, steps=12))
    assert task.steps_per_epoch == 4
    rates = [learning_rate_at(task, step) for step in range(12)]
    assert rates == pytest.approx([1.0] * 4 + [0.75] * 4 + [0.25] * 4)


def test_what_cannot_be_batched_still_depends_on_its_seed_alone(toy: Classification) -> None:
    class Odd(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, images: Tensor) -> Tensor:
            output = F.dropout(super().forward(images), 0.5, self.training)
            return output * 2 if output.sum().item() > 1e9 else output

    task = with_network(toy, Odd, optimizer="sgd", learning_rate=0.05)
    with pytest.warns(VectorisationWarning):
        together, alone = train_population(task, [1, 2, 3], [12]), train_population(task, [2], [12])
    torch.testing.assert_close(together.weights[1], alone.weights[0], rtol=1e-4, atol=1e-6)


def test_a_full_device_is_said_and_a_failing_compiler_done_without(
    toy: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(*args: object, **kwargs: object) -> object:
        def compiled(*args: object) -> None:
            raise RuntimeError("no compiler")

        return compiled

    with monkeypatch.context() as patch:
        patch.setattr("mole.checkpoints.population.vmap", lambda loss: full)
        with pytest.raises(MoleError, match=r"no memory on cpu for 2 networks at once; lower harvest\.group_size"):
            train_population(toy, [1, 2], [4])
    monkeypatch.setattr(torch, "compile", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VectorisationWarning)
        found = train_population(toy, [1, 2], [4], compiled=True)
    assert torch.equal(found.weights, train_population(toy, [1, 2], [4]).weights)
