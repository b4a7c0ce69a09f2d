"""Populations on every machine of a Ray cluster. The only file that imports Ray (`pip install ray`).

`RAY_ADDRESS` names the cluster; without it one is started on this machine. Every machine needs MOLE, and the
data of the task under the same `MOLE_DATA` or by download.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from mole.checkpoints.backends import Progress
from mole.checkpoints.groups import Group, Harvested, train_group
from mole.config import HarvestConfig, TaskConfig
from mole.errors import MoleError
from mole.tasks import Task, load_task

RETRIES = 20
"""Times that a group is trained again after its worker died; a group that kills every worker shall end."""

AHEAD = 2
"""Groups per CPU that are handed to the cluster: enough to keep a worker that joins busy."""


class RayBackend:
    """Each group is a Ray task, tried again wherever its worker dies; workers may come and go meanwhile."""

    def __init__(self, task: Task, harvest: HarvestConfig) -> None:
        self.task, self.harvest = task, harvest
        self.nodes: Counter[str] = Counter()
        """Groups that each node of the cluster has trained."""

    def run(self, groups: Iterable[Group], progress: Progress | None = None) -> Iterator[Harvested]:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        gpus = 1 if self.task.device.type == "cuda" else 0
        train = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)(_train)
        settings = (self.task.config, self.harvest, os.environ.get("MOLE_DATA"))
        waiting, pending, done = iter(groups), dict[Any, Group](), 0
        try:
            while True:
                while len(pending) < AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))):
                    group = next(waiting, None)
                    if group is None:
                        break
                    pending[train.remote(group, *settings)] = group
                if not pending:
                    return
                (ready, *_), _ = ray.wait(list(pending), num_returns=1)
                try:
                    node, found = ray.get(ready)
                except (WorkerCrashedError, OutOfMemoryError) as error:
                    why = " ".join(str(error).split())[:160]
                    raise MoleError(
                        f"{pending[ready].name}: its worker died {RETRIES + 1} times ({why}); "
                        "lower harvest.group_size if memory is short"
                    ) from None
                self.nodes[node] += 1
                group = pending.pop(ready)
                done += len(group.runs) * group.config.steps
                if progress is not None:
                    progress(done)
                yield found
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def _train(group: Group, task: TaskConfig, harvest: HarvestConfig, data: str | None) -> tuple[str, Harvested]:
    """Train a group on the worker; returns which node that was, and the result."""
    if data is not None:
        os.environ.setdefault("MOLE_DATA", data)
    torch.set_num_threads(1)
    loaded = _loaded(task.model_dump_json())
    place = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    return ray.get_runtime_context().get_node_id(), train_group(loaded.to(place), group, harvest)


@lru_cache(maxsize=2)
def _loaded(config: str) -> Task:
    """The task of a configuration, loaded once per worker."""
    return load_task(TaskConfig.model_validate_json(config))
