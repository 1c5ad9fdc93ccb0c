"""SIGTERM as a question: whether this process was told to end, instead of its end. Knows no training."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """While the block runs, the first SIGTERM only makes the function true that it gives; a second one acts as before.

    In other threads than the main one, where Python allows no handlers, nothing is changed.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = signal.getsignal(signal.SIGTERM)

    def heed(number: int, frame: Any) -> None:
        told.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, heed)
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
