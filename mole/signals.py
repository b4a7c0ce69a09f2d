"""What the process does when it is told to stop (SIGTERM) or to save (SIGUSR1), as schedulers of clusters do."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mole.errors import StoppedError

SAVE = getattr(signal, "SIGUSR1", None)


@contextmanager
def handling(on_stop: Callable[[], Any], on_save: Callable[[], Any]) -> Iterator[None]:
    """Within the block SIGTERM calls `on_stop` and SIGUSR1 `on_save`; elsewhere than in the main thread, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted: dict[Any, Callable[[], Any]] = {signal.SIGTERM: on_stop}
    if SAVE is not None:
        wanted[SAVE] = on_save
    before = {number: signal.getsignal(number) for number in wanted}

    def call(number: int, _: FrameType | None) -> None:
        wanted[number]()

    for number in wanted:
        signal.signal(number, call)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop() -> None:
    """End the process in good order.

    Raises:
        StoppedError: always.
    """
    raise StoppedError(signal.SIGTERM)
