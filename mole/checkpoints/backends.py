"""Where populations train: here, in the background, or on other machines (`ray_backend`)."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from mole.checkpoints.groups import Group, Harvested, train_group
from mole.config import HarvestConfig
from mole.errors import MoleError
from mole.tasks import Task

Progress = Callable[[int], None]
"""Told the network-steps done so far, over all groups."""


class Backend(Protocol):
    """Trains groups; every group comes out exactly once, in whatever order."""

    def run(self, groups: Iterable[Group], progress: Progress | None = None) -> Iterator[Harvested]:
        """Train these groups, which may be endless, no faster than the results are taken."""
        ...


class Local:
    """One group after the other, in this process, on the device of the task's data."""

    def __init__(self, task: Task, harvest: HarvestConfig) -> None:
        self.task, self.harvest = task, harvest

    def run(self, groups: Iterable[Group], progress: Progress | None = None) -> Iterator[Harvested]:
        done = 0
        for group in groups:
            base = done

            def told(steps: int, base: int = base) -> None:
                if progress is not None:
                    progress(base + steps)

            yield train_group(self.task, group, self.harvest, told)
            done += len(group.runs) * group.config.steps


def make_backend(task: Task, harvest: HarvestConfig) -> Backend:
    """The backend that a configuration asks for.

    Raises:
        MoleError: Ray is asked for and not installed.
    """
    if harvest.backend == "local":
        return Local(task, harvest)
    try:
        from mole.checkpoints.ray_backend import RayBackend
    except ImportError:
        raise MoleError("harvest.backend is ray, which is not installed: pip install ray, or use local") from None
    return RayBackend(task, harvest)


class Background:
    """Another backend's results, made ahead of their use by a thread: at most `ahead` wait, then it waits."""

    def __init__(self, backend: Backend, groups: Iterable[Group], *, ahead: int = 1) -> None:
        self.results: queue.Queue[Harvested | BaseException] = queue.Queue(ahead)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(backend, groups), daemon=True, name="populations")
        self.thread.start()

    def _work(self, backend: Backend, groups: Iterable[Group]) -> None:
        try:
            for found in backend.run(groups):
                if not self._put(found):
                    return
        except BaseException as error:  # handed to the thread that takes the results
            self._put(error)

    def _put(self, item: Harvested | BaseException) -> bool:
        while not self.stopped.is_set():
            try:
                self.results.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def take(self, *, wait: bool) -> Harvested | None:
        """The next result; None if there is none yet and it is not to be waited for.

        Raises:
            BaseException: whatever stopped the populations.
        """
        try:
            found = self.results.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """Let the group that trains now be the last, and forget what is not taken."""
        self.stopped.set()
        self.thread.join()
