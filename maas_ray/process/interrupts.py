"""Signals that ask a program to end, as exceptions and as questions. Knows no command, and changes nothing on import.

SIGINT (Ctrl-C), SIGTERM (`kill`, `ray job stop`, systemd) and SIGHUP (the terminal was closed) mean the same here. A
signal that the program was started without, as `nohup` and background jobs of a script are, stays ignored. Handlers exist
in the main thread only; in another one everything here changes nothing.
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
"""Python runs no handler while its main thread is in a call of C or Rust that looks for no signals, such as one to a store
that does not answer. After this time the program is ended without it."""

_last: signal.Signals | None = None
_handled_at = 0.0
_is_watched = False
_is_taken_over = False


class Interrupted(KeyboardInterrupt):
    """The program was asked to end. Raised in the main thread, wherever it is.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def last() -> signal.Signals | None:
    """The newest signal that asked this program to end; None if none has."""
    return _last


def note(number: int) -> None:
    """Remembers a signal that a handler took."""
    global _last, _handled_at
    _last, _handled_at = signal.Signals(number), time.monotonic()


def exit_code(number: int) -> int:
    """What a shell takes for the end by a signal."""
    return 128 + number


def take_over(when_stuck: Callable[[signal.Signals], None] | None = None) -> None:
    """Makes every signal that asks to end an `Interrupted` from here on; for programs, at their start.

    Args:
        when_stuck: called in another thread when the main thread has not reacted within `STUCK_S`; it has to end the process.
    """
    global _is_taken_over
    if threading.current_thread() is threading.main_thread():
        if when_stuck is not None:
            _watch(when_stuck)
        _is_taken_over = True
        for number in _heeded():
            signal.signal(number, _raise)


def let_go() -> None:
    """From here on the next signal ends the process at once and without a word; for a program that is at its end."""
    global _is_taken_over
    if _is_taken_over:
        _is_taken_over = False
        for number in _heeded():
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def kept() -> Iterator[None]:
    """Keeps the handlers of `take_over` through a block that puts others in their place.

    Ray does so when a driver connects: first one in Python, then one in C++ that prints a native trace, and when it
    leaves it restores the system's default. SIGTERM and SIGHUP wait until the end of the block, which has to be short;
    Ctrl-C does not.
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
    """Signals that came during a block of `held`."""

    def __init__(self) -> None:
        self.count = 0
        self._last: signal.Signals | None = None
        self._is_open = False

    @property
    def number(self) -> signal.Signals | None:
        """The newest one."""
        return self._last

    @contextmanager
    def open(self) -> Iterator[None]:
        """A part of the block that a signal may interrupt: it raises `Interrupted` there, also one that came before."""
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
    """Runs a block to its end whatever signals come; then the last one of them has the effect that it had before.

    For what must not be left half done: an undoing, a commit together with the word that it was made.
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
    """While the block runs, the first signal is only counted; a second one acts as it did before the block."""
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
    """Takes the first of these signals as a notice; a further one acts as it did before. For the main thread.

    Args:
        numbers: of the signals.
        heard: called in the handler, once all of them act as before again.

    Returns:
        What puts the handlers of before back.
    """
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one of C's

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
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, whatever the main thread does

    def watch() -> None:
        # They are the main thread's, also while it has them wait (`kept`).
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
    """Those that this program was not told to ignore, and whose handler Python can put back (None: one of C's)."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
