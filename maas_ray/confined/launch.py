"""Manages one fork server per process: started on the first call, and restarted after it has ended."""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maas_ray.confined.server import HEAD

_MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from maas_ray.confined.server import main; main()"
_KEPT = ("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_", "LD_LIBRARY_PATH", "CUDA", "NVIDIA")
"""Prefixes of the variables that children receive: the parser of a hostile file must not get store credentials."""
_END_TIMEOUT_S = 5.0


class Server:
    """The fork server of this process; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the fork server; None if none was started or the last one has ended."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def ask(self, job: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Requests the server to start a child for a job.

        Args:
            job: the job, as `server.py` reads it.
            descriptors: descriptors that are duplicated for the child.

        Raises:
            OSError: the server cannot be started.
        """
        text = json.dumps(job).encode()
        with self._lock:
            try:
                _send(self._running(), text, descriptors)
            except (
                BrokenPipeError,
                ConnectionResetError,
            ):  # it ended at this moment after its idle time, or was killed
                self.close()
                _send(self._running(), text, descriptors)

    def close(self) -> None:
        """Ends the server and all its children."""
        control, process, self._control, self._process = self._control, self._process, None, None
        if control is not None:
            control.close()
        if process is None or self._owner != os.getpid():
            return
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _running(self) -> socket.socket:
        if self._control is not None and self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._control
            self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _MAIN, json.dumps(_search_path())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # the parent handles a Ctrl-C in the terminal
            )
        self._control, self._owner = ours, os.getpid()
        return ours


def _send(control: socket.socket, text: bytes, descriptors: Sequence[int]) -> None:
    socket.send_fds(control, [HEAD.pack(len(text))], descriptors)
    control.sendall(text)


def _search_path() -> list[str]:
    """The module search path of this process without its working directory, plus the location of this package."""
    here = os.getcwd()
    found = [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) != here]
    return [*found, str(Path(__file__).parents[2])]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
    # One thread in the server, so that forking it is safe; the sessions of children start their own threads.
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


SERVER = Server()
atexit.register(SERVER.close)
