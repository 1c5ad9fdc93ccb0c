"""Kills a process with SIGKILL at its n-th call of the operating system that changes a file; run as a program.

Reads lines `<n> <what>` and answers each with `killed` or `done` when the process that it forked for it has ended: forking
from one that has imported everything takes milliseconds.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CALLS = ("open", "write", "fsync", "link", "unlink", "mkdir", "rmdir")


def die_at(number: int) -> None:
    """From here on the process dies at this call, counted from 1; of a `write` it has done half by then."""
    count = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def _answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """The argument is `module:function`; the function is called with <what>."""
    module, _, name = sys.argv[1].partition(":")
    act = getattr(importlib.import_module(module), name)
    _answer("ready")
    for line in sys.stdin:
        number, _, what = line.strip().partition(" ")
        child = os.fork()
        if child == 0:
            die_at(int(number))
            act(what)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        _answer("killed" if is_killed else f"done {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
