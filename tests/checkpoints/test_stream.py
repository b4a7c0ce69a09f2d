import threading
import time
from typing import Any

import pytest
import torch

from mole.checkpoints.backends import Background, Local, make_backend
from mole.checkpoints.groups import Group, Harvested, plan_groups, train_group
from mole.checkpoints.stream import Reservoir
from mole.config import GeneratorConfig, HarvestConfig, TrainConfig, VaryConfig
from mole.diffusion.pairs import StreamPairs
from mole.errors import MoleError
from mole.tasks import Classification

SETTINGS: dict[str, Any] = {"checkpoints": 3, "group_size": 4, "runs": 6, "heldout_runs": 2, "reservoir": 8, "reuse": 3}


@pytest.fixture
def harvest() -> HarvestConfig:
    return HarvestConfig(mode="stream", **SETTINGS)


class Slow:
    """A backend that lets itself be watched."""

    def __init__(self, backend: Local) -> None:
        self.backend, self.made = backend, 0

    def run(self, groups: Any, progress: Any = None) -> Any:
        for found in self.backend.run(groups):
            self.made += 1
            yield found


def test_the_background_waits_while_its_results_are_not_taken(toy: Classification, harvest: HarvestConfig) -> None:
    slow = Slow(Local(toy, harvest))
    groups = plan_groups(toy.config, harvest, 0, range(40))
    background = Background(slow, groups, ahead=2)
    time.sleep(1.0)
    assert slow.made == 3  # two wait, one is in the hand of the thread
    assert background.take(wait=True).group.name == "group-00000"  # type: ignore[union-attr]
    deadline = time.monotonic() + 20
    while slow.made < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.made == 4
    background.stop()
    assert not background.thread.is_alive()


def test_a_fault_in_the_background_reaches_the_reader(toy: Classification, harvest: HarvestConfig) -> None:
    class Broken:
        def run(self, groups: Any, progress: Any = None) -> Any:
            raise MoleError("no room")
            yield

    background = Background(Broken(), [])
    with pytest.raises(MoleError, match="no room"):
        background.take(wait=True)
    background.stop()


def test_nothing_is_read_more_often_than_allowed_and_memory_is_bounded(
    toy: Classification, harvest: HarvestConfig
) -> None:
    records: list[dict[str, Any]] = []
    reservoir = Reservoir(toy, harvest, 0, record=records.append)
    pairs, generator = StreamPairs(reservoir, toy, GeneratorConfig()), torch.Generator().manual_seed(0)
    config = TrainConfig(batch_size=16)
    seen: dict[bytes, int] = {}
    try:
        for _ in range(20):
            assert 1 <= len(reservoir.runs) <= 8
            ((_, batch),) = pairs.pairs(config, generator)
            assert batch.start.shape == (16, toy.spec.size) and bool((batch.known["start_loss"] > 0).all())
            for row in [*batch.start, *batch.clean]:
                seen[row.numpy().tobytes()] = seen.get(row.numpy().tobytes(), 0) + 1
            assert len(reservoir.runs) <= 8
    finally:
        reservoir.close()
    flow = reservoir.flow
    assert max(seen.values()) <= 3 and flow.reads == 20 * 32 == sum(seen.values())
    assert flow.runs == 4 * len(records) and flow.checkpoints == 3 * flow.runs and 0 < flow.reuse <= 3
    assert "fresh checkpoints/s, each read" in flow.note()
    runs = [run for record in records for run in record["runs"]]
    assert runs == [run if run < 6 else run + 2 for run in range(len(runs))]  # held-out runs are never streamed
    assert not any(thread.name == "populations" for thread in threading.enumerate())


def test_any_streamed_network_can_be_made_again_bit_for_bit(toy: Classification) -> None:
    harvest = HarvestConfig(mode="stream", **SETTINGS, vary=VaryConfig(learning_rate=[0.01, 0.02]))
    records: list[dict[str, Any]] = []
    reservoir = Reservoir(toy, harvest, 3, record=records.append)
    reservoir.close()
    for record in records:
        config = toy.config.model_copy(update=record["factors"])
        group = Group("again", config, record["runs"], record["seeds"], record["factors"])
        assert train_group(toy, group, harvest).digest == record["digest"]
    assert {record["factors"]["learning_rate"] for record in records} == {0.01, 0.02}


def test_pairs_are_of_one_run_and_in_order(toy: Classification, harvest: HarvestConfig) -> None:
    reservoir = Reservoir(toy, harvest.model_copy(update={"reuse": 1000}), 0)
    states = {row.numpy().tobytes(): (i, k) for i, r in enumerate(reservoir.runs) for k, row in enumerate(r.weights)}
    reservoir.close()
    names = ["target_loss", "target_accuracy", "steps", "optimizer"]  # recipes are in the next test
    source = StreamPairs(reservoir, toy, GeneratorConfig.model_validate({"conditions": names}))
    ((_, batch),) = source.pairs(TrainConfig(batch_size=64), torch.Generator().manual_seed(0))
    assert list(batch.known) == names and set(batch.known["optimizer"].tolist()) == {0.0}
    for start, clean, target in zip(batch.start, batch.clean, batch.known["target_loss"], strict=True):
        (run, first), (other, second) = states[start.numpy().tobytes()], states[clean.numpy().tobytes()]
        assert run == other and first <= second and target == reservoir.runs[run].loss[second]


def test_streamed_runs_are_told_with_their_own_recipe(toy: Classification) -> None:
    harvest = HarvestConfig(
        mode="stream", **SETTINGS, vary=VaryConfig(learning_rate=[0.01, 0.02], optimizer=["adam", "sgd"])
    )
    records: list[dict[str, Any]] = []
    reservoir = Reservoir(toy, harvest, 0, record=records.append)
    reservoir.close()
    known = {seed: record["factors"] for record in records for seed in record["seeds"]}
    for run in reservoir.runs:
        assert run.values["learning_rate"].tolist() == pytest.approx([known[run.seed]["learning_rate"]] * len(run.uses))
        assert set(run.values["optimizer"].tolist()) == {["adam", "sgd"].index(known[run.seed]["optimizer"])}


def test_a_resumed_stream_reads_no_run_again(toy: Classification, harvest: HarvestConfig) -> None:
    first: list[dict[str, Any]] = []
    reservoir = Reservoir(toy, harvest, 0, record=first.append)
    reservoir.close()
    second: list[dict[str, Any]] = []
    Reservoir(toy, harvest, 0, state=reservoir.state(), record=second.append).close()
    runs = [{run for record in part for run in record["runs"]} for part in (first, second)]
    assert runs[0] and runs[1] and not runs[0] & runs[1]


def test_diverged_runs_are_not_read_and_a_stream_of_nothing_else_says_so(
    toy: Classification, harvest: HarvestConfig
) -> None:
    hot = toy.with_config(toy.config.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30}))
    with pytest.raises(MoleError, match=r"16 runs in a row diverged; lower task\.learning_rate"):
        Reservoir(hot, harvest, 0)


def test_networks_of_two_widths_cannot_be_streamed(toy: Classification, harvest: HarvestConfig) -> None:
    varied = harvest.model_copy(update={"vary": VaryConfig(width=[3])})
    with pytest.raises(MoleError, match="several widths or depths cannot be streamed"):
        Reservoir(toy, varied, 0)


def test_local_groups_come_in_order_with_progress(toy: Classification, harvest: HarvestConfig) -> None:
    groups, told = plan_groups(toy.config, harvest, 0, range(8)), list[int]()
    found: list[Harvested] = list(make_backend(toy, harvest).run(groups, told.append))
    assert [part.group.name for part in found] == ["group-00000", "group-00001"]
    assert told == sorted(told) and told[-1] == 8 * toy.config.steps


def test_a_resumed_stream_remembers_what_was_read_from(toy: Classification, harvest: HarvestConfig) -> None:
    first = Reservoir(toy, harvest, 0)
    first.close()
    state = first.state()
    state["flow"] |= {"ranges": {"loss": (-1.0, 9.0)}, "reads": 5, "digests": ["a"]}
    second = Reservoir(toy, harvest, 0, state=state)
    second.close()
    assert second.flow.ranges["loss"][0] == -1.0 and second.flow.digests[0] == "a" and len(second.flow.digests) > 1
    assert second.flow.checkpoints > first.flow.checkpoints and second.flow.before == first.flow.checkpoints


def test_threads_that_build_networks_do_not_disturb_each_other(toy: Classification) -> None:
    wanted = toy.initial(range(40))
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            toy.architecture.build(7)
            torch.manual_seed(1)
            torch.rand(3)

    other = threading.Thread(target=disturb)
    other.start()
    found = [toy.initial(range(40)) for _ in range(5)]
    stop.set()
    other.join()
    assert all(torch.equal(part, wanted) for part in found)
