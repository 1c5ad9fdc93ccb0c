"""How an HAProxy follows another one without a gap: whoever started the other one, and whether its manager still lives."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from socket import AF_UNIX, SOCK_DGRAM, socket

from maas_ray.haproxy import generations
from maas_ray.haproxy.admin import running_pid
from maas_ray.haproxy.generations import Generation
from maas_ray.haproxy.names import KEEPER_SOCKET, LAST_GOOD_FILE
from maas_ray.haproxy.process import Process, find

MANAGER_TITLE = "ray::HAProxyManager"
"""How Ray names the process of Serve's actor that starts, reloads and checks HAProxy."""
KEEPER = "maas_ray.haproxy.keeper"
_HAND_OVER = ("-sf", "-st", "-x")


def is_manager(process: Process) -> bool:
    """Whether a process is Serve's actor."""
    command = process.command
    return bool(command) and command[0].startswith(MANAGER_TITLE)


def succeed(path: Path, binary: str, arguments: list[str], manager: Process) -> list[str]:
    """Prepares this process to become the next HAProxy of a directory.

    A manager that is new knows of no HAProxy before its own, and of no application yet: the sockets are then taken
    over from the one that runs, and so is its configuration, until Serve writes one with applications.

    Args:
        path: the hardened file.
        binary: HAProxy.
        arguments: Serve's.
        manager: Serve's actor, which is the parent of this process.

    Returns:
        The arguments for HAProxy.
    """
    directory = path.parent
    if "-sf" not in arguments:
        arguments = [*arguments, *_take_over(path)]
    config = path.read_text()
    me = find(os.getpid())
    # What ends the manager's process group is not to end HAProxy. Not a session of its own: Linux shares the CPUs between
    # sessions (sched_autogroup), and HAProxy then takes the replicas' time: measured with 128 callers on two cores, 7 %
    # fewer requests per second and a p99 of 15 instead of 11 ms.
    with suppress(OSError):
        os.setpgid(0, 0)
    flags = _flags(arguments)
    generations.record(directory, Generation(me, manager, binary, flags, config, generations.now_s()))
    wake_keeper(directory)
    return arguments


def wake_keeper(directory: Path, message: bytes = b"look") -> bool:
    """Sends the keeper of a directory a message; starts one for `look` if there is none.

    Returns:
        Whether a keeper had the message.
    """
    with socket(AF_UNIX, SOCK_DGRAM) as sock:
        sock.settimeout(1)
        try:
            sock.sendto(message, str(directory / KEEPER_SOCKET))
            return True
        except OSError:
            pass
    if message == b"look":
        # Twice removed, so that it is nobody's child: HAProxy, which this process becomes, asks for no exit codes.
        starter = "import subprocess, sys; subprocess.Popen(sys.argv[1:], process_group=0)"
        with (directory / "keeper.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", starter, sys.executable, "-P", "-m", KEEPER],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=20,
            )  # fmt: skip
    return False


def _take_over(path: Path) -> list[str]:
    """Arguments to follow the HAProxy that runs, if one does; this file becomes its configuration if it has none."""
    directory, config = path.parent, path.read_text()
    socket_path = generations.admin_socket(config, directory)
    pid = running_pid(socket_path)
    if pid is None:
        # One that lives but does not answer keeps its ports; older ones work off their last requests.
        for generation in generations.recorded(directory)[:1]:
            generation.process.send(signal.SIGKILL)
        return []
    with suppress(OSError):
        last_good = (directory / LAST_GOOD_FILE).read_text()
        if not generations.has_applications(config) and generations.listens_alike(config, last_good):
            path.write_text(last_good)
    return ["-sf", str(pid), "-x", str(socket_path)]


def _flags(arguments: list[str]) -> list[str]:
    """Serve's arguments without the file and what belongs to a hand-over."""
    kept: list[str] = []
    skipping = False
    for argument in arguments:
        if argument.startswith("-"):
            skipping = argument in (*_HAND_OVER, "-f")
        if not skipping:
            kept.append(argument)
    return kept
