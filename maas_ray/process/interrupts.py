"""Handles terminating signals as exceptions or as states to poll. Independent of commands; the import changes nothing.

SIGINT (Ctrl-C), SIGTERM (`kill`, `ray job stop`, systemd) and SIGHUP (a closed terminal) are equivalent. A signal that
was ignored at the start of the program, as by `nohup` or in background jobs of a script, stays ignored. Python runs
handlers in the main thread only; in other threads these functions change nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

STUCK_S = 5.0
"""Python runs no handler while its main thread is in a C or Rust call that checks no signals, such as a request to a
store that does not answer. After this time the program is ended without the handler."""

_last: signal.Signals | None = None
_handled_at = 0.0
_is_watched = False
_is_taken_over = False


class Interrupted(KeyboardInterrupt):
    """The program received a terminating signal. Raised in the main thread, at any point.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def last() -> signal.Signals | None:
    """The newest terminating signal that this program received, or None."""
    return _last


def note(number: int) -> None:
    """Records a handled signal."""
    global _last, _handled_at
    _last, _handled_at = signal.Signals(number), time.monotonic()


def exit_code(number: int) -> int:
    """The exit code that shells expect after a signal."""
    return 128 + number


def take_over(when_stuck: Callable[[signal.Signals], None] | None = None) -> None:
    """Raises `Interrupted` for every terminating signal from here on. Programs call it at their start.

    Args:
        when_stuck: called in another thread if the main thread does not respond within `STUCK_S`; must end the process.
    """
    global _is_taken_over
    if threading.current_thread() is threading.main_thread():
        if when_stuck is not None:
            _watch(when_stuck)
        _is_taken_over = True
        for number in _heeded():
            signal.signal(number, _raise)


def let_go() -> None:
    """Restores the default: the next signal ends the process immediately and silently. For a program at its end."""
    global _is_taken_over
    if _is_taken_over:
        _is_taken_over = False
        for number in _heeded():
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def kept() -> Iterator[None]:
    """Restores the handlers of `take_over` after a block that replaces them.

    Ray does so when a driver connects: first it installs a handler in Python, then one in C++ that prints a native
    stack trace, and at the disconnect it restores the system's default. SIGTERM and SIGHUP are delivered at the end of
    the block, which must be short; Ctrl-C is delivered immediately.
    """
    if not _is_taken_over or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Held:
    """The signals received during a block of `held`."""

    def __init__(self) -> None:
        self.count = 0
        self._last: signal.Signals | None = None
        self._is_open = False

    @property
    def number(self) -> signal.Signals | None:
        """The newest signal, or None."""
        return self._last

    @contextmanager
    def open(self) -> Iterator[None]:
        """A part of the block that signals interrupt: they raise `Interrupted`, including those received before it."""
        self._is_open = True
        try:
            if self._last is not None:
                raise Interrupted(self._last)
            yield
        finally:
            self._is_open = False

    def _take(self, number: int, frame: Any) -> None:
        note(number)
        self.count += 1
        self._last = signal.Signals(number)
        if self._is_open:
            raise Interrupted(number)


@contextmanager
def held() -> Iterator[Held]:
    """Runs a block to its end despite signals; afterwards the last one is delivered to its previous handler.

    For work that must be completed: a rollback, or a commit together with its report.
    """
    taken = Held()
    if threading.current_thread() is not threading.main_thread():
        yield taken
        return
    before = {number: signal.getsignal(number) for number in _heeded()}
    for number in before:
        signal.signal(number, taken._take)
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if taken.number is not None:
            signal.raise_signal(taken.number)


@contextmanager
def told_to_end() -> Iterator[Held]:
    """During the block the first signal is only recorded; a second one is delivered to its previous handler."""
    told = Held()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    restore = take_first(_heeded(), lambda number: told._take(number, None))
    try:
        yield told
    finally:
        restore()


def take_first(numbers: Iterable[int], heard: Callable[[int], object]) -> Callable[[], None]:
    """Calls a function for the first of these signals; further ones have their previous handlers. Main thread only.

    Args:
        numbers: numbers of the signals.
        heard: called in the handler, after the previous handlers were restored.

    Returns:
        A function that restores the previous handlers.
    """
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a C handler

    def heed(number: int, frame: Any) -> None:
        restore()
        heard(number)

    for number in before:
        signal.signal(number, heed)
    return restore


def _watch(when_stuck: Callable[[signal.Signals], None]) -> None:
    global _is_watched
    if _is_watched:
        return
    _is_watched = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written immediately, even if the main thread is blocked

    def watch() -> None:
        # The signals belong to the main thread, even while it blocks them (`kept`).
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while numbers := os.read(reader, 64):
            came_at = time.monotonic()
            asked = [number for number in SIGNALS if number in numbers]
            while asked and _handled_at < came_at - 0.5:
                if not _is_taken_over:
                    break
                if time.monotonic() - came_at > STUCK_S:
                    when_stuck(asked[-1])
                    return
                time.sleep(0.05)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()


def _raise(number: int, frame: Any) -> None:
    note(number)
    raise Interrupted(number)


def _heeded() -> list[signal.Signals]:
    """The signals that are not ignored and whose handler Python can restore (None: a C handler)."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
