"""The fork server of confined children: it has one thread, so that forking is safe, and keeps their modules imported.

`child.py` starts it as a new interpreter; it imports a function's module before the first fork for it, and calls the
module's `prepare`, if it has one, so that a later child starts in milliseconds. It ends when its parent has ended, or
after some idle time; its children end with it. Files are only processed in the children.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from maas_ray.confined.frames import receive_frame, send_frame
from maas_ray.errors import MaasError

IDLE_S = 60.0
"""The server ends after this time without a child; the next call starts another one."""
HEAD = struct.Struct("<I")
STARTED = struct.Struct("<i")
ENDED = struct.Struct("<i")
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # sys/prctl.h
_LOOK_FOR_PARENT_S = 1.0

_libc = ctypes.CDLL(None)
_prepared: set[str] = set()
"""Modules whose `prepare` was called; it must not start threads or process untrusted data."""


def serve(control: socket.socket) -> None:
    """Forks a child for each job, and reports the exit status of each, until the other side closes the socket.

    Args:
        control: socket for jobs: a length, a JSON text, and with the length the descriptors of the job.
    """
    parent = os.getppid()
    children: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    idle_since_s = time.monotonic()
    while os.getppid() == parent:  # a copy of the control socket may outlive the parent in another child of it
        ready, _, _ = select.select([control, woken], [], [], _LOOK_FOR_PARENT_S)
        if woken in ready:
            woken.recv(4096)
        _reap(children)
        if control in ready:
            job = _receive(control)
            if job is None:
                return
            pid, status = _fork(*job)
            children[pid] = status
        if children:
            idle_since_s = time.monotonic()
        elif time.monotonic() - idle_since_s > IDLE_S:
            return


def _receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    data, descriptors, _, _ = socket.recv_fds(control, HEAD.size, 250, socket.MSG_WAITALL)
    if len(data) < HEAD.size:
        return None
    (length,) = HEAD.unpack(data)
    text = control.recv(length, socket.MSG_WAITALL)
    if len(text) < length:
        return None
    return json.loads(text), descriptors


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as report:
            try:
                report.send(ENDED.pack(status))
            except OSError:
                continue  # the caller has ended


def _fork(job: dict[str, Any], descriptors: list[int]) -> tuple[int, socket.socket]:
    data, status, errors, *extra = descriptors
    report = socket.socket(fileno=status)
    failure: BaseException | None = None
    try:
        function = _find(job["function"])
    except BaseException as error:  # the child reports it
        failure = error
    gc.freeze()  # the children's garbage collector must not write to shared pages
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _become_child(server, data, errors, {data, errors, *extra})
            if failure is not None:
                raise failure
            _run(function, job, socket.socket(fileno=data), extra)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[-2000:])
            os._exit(70)
    for descriptor in (data, errors, *extra):
        os.close(descriptor)
    handles = [os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else []
    try:
        socket.send_fds(report, [STARTED.pack(pid)], handles)
    except OSError:
        os.kill(pid, signal.SIGKILL)  # the caller has ended
    for handle in handles:
        os.close(handle)
    return pid, report


def _find(path: str) -> Callable[..., Any]:
    name, _, function = path.partition(":")
    module = importlib.import_module(name)
    if name not in _prepared:
        getattr(module, "prepare", lambda: None)()
        _prepared.add(name)
    found: Callable[..., Any] = getattr(module, function)
    return found


def _become_child(server: int, data: int, errors: int, kept: set[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.getppid() != server:
            os._exit(70)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    # A child has only its own descriptors: the end of a sibling is detected when the last copy of its socket is closed.
    for name in os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in kept:
            try:
                os.close(descriptor)
            except OSError:
                continue  # the descriptor of the listing itself


def _run(function: Callable[..., Any], job: dict[str, Any], data: socket.socket, extra: list[int]) -> NoReturn:
    if job["is_service"]:
        _limit(job)
        function(data, extra)
        os._exit(0)
    payload, blobs = receive_frame(data)
    _limit(job)  # only now, so that the sent data does not count
    try:
        found, buffers = function(payload, blobs)
    except MaasError as error:
        send_frame(data, {"error": error.code, "args": list(error.args)})
    except MemoryError:
        send_frame(data, {"memory": True})
    else:
        send_frame(data, {"value": found}, buffers)
    os._exit(0)


def _limit(job: dict[str, Any]) -> None:
    if job["cpu_s"] is not None:
        used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _lower(resource.RLIMIT_CPU, int(used_s + job["cpu_s"]) + 1)
    if job["memory_bytes"] is not None and sys.platform == "linux":
        # Writable private memory only: mapped libraries and the address space that allocators reserve do not count.
        _lower(resource.RLIMIT_DATA, _data_bytes() + job["memory_bytes"])
    if job["file_bytes"] is not None:
        _lower(resource.RLIMIT_FSIZE, job["file_bytes"])


def _lower(kind: int, wanted: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _data_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def main() -> NoReturn:
    """Entry point of the new interpreter; descriptor 0 is the control socket."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        serve(control)
    finally:
        os._exit(0)
