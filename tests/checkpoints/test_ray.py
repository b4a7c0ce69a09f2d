"""A real cluster on this machine: two workers, one of them killed, another joining."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mole.checkpoints import Header, Zoo, ZooWriter
from mole.checkpoints.backends import Local, make_backend
from mole.checkpoints.groups import plan_groups, run_name
from mole.config import HarvestConfig, TaskConfig
from mole.tasks import load_task

ray = pytest.importorskip("ray")

HARVEST = HarvestConfig(backend="ray", checkpoints=3, group_size=4)
TASK = TaskConfig(name="iris", steps=40)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[int]:
    """Processes that train groups now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_train"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_worker_costs_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    task = load_task(TASK)
    groups = plan_groups(TASK, HARVEST, 0, range(80))
    header, killed = Header("loss", "float32", {}), 0
    with ZooWriter(tmp_path, header, "group") as writer:
        for found in make_backend(task, HARVEST).run(groups):
            assert not writer.has(found.group.name)
            writer.write(found.group.name, task.spec, found.weights, found.columns)
            deadline = time.monotonic() + 60
            while killed < 2 and time.monotonic() < deadline:  # the first two groups each cost a worker its life
                if busy := workers():
                    os.kill(busy[0], signal.SIGKILL)
                    killed += 1
                    break
                time.sleep(0.005)
    assert killed == 2
    zoo = Zoo(tmp_path)
    assert zoo.runs == 80 and len(zoo) == 240
    assert sorted(set(zoo.column("run"))) == [run_name(run) for run in range(80)]
    here = {found.group.name: found for found in Local(task, HARVEST).run(groups)}
    for group in groups:
        part = zoo.filter(run=[run_name(run) for run in group.runs])
        torch.testing.assert_close(part.read(range(12)), here[group.name].weights, rtol=1e-4, atol=1e-6)


def test_a_worker_that_joins_takes_its_share(cluster: Any) -> None:
    backend: Any = make_backend(load_task(TASK), HARVEST)
    results = backend.run(plan_groups(TASK, HARVEST, 1, range(400)))
    first = [next(results) for _ in range(4)]
    before = set(backend.nodes)
    node = cluster.add_node(num_cpus=1)
    rest = list(results)
    assert len({found.group.name for found in [*first, *rest]}) == 100 == sum(backend.nodes.values())
    assert node.node_id not in before and backend.nodes[node.node_id] > 0
    cluster.remove_node(node)
