"""Succession of HAProxy processes without a gap, whoever started the previous one and whether its manager is alive."""

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
"""Ray's process title of Serve's actor that starts, reloads and checks HAProxy."""
KEEPER = "maas_ray.haproxy.keeper"
_HAND_OVER = ("-sf", "-st", "-x")


def is_manager(process: Process) -> bool:
    """Whether a process is Serve's actor."""
    command = process.command
    return bool(command) and command[0].startswith(MANAGER_TITLE)


def succeed(path: Path, binary: str, arguments: list[str], manager: Process) -> list[str]:
    """Prepares this process to become the next HAProxy of a directory.

    A new manager has no record of an earlier HAProxy, and no application yet: then the sockets of the running HAProxy
    are taken over, and so is its configuration, until Serve writes one with applications.

    Args:
        path: hardened file.
        binary: path of HAProxy.
        arguments: Serve's arguments.
        manager: Serve's actor, the parent of this process.

    Returns:
        Arguments for HAProxy.
    """
    directory = path.parent
    if "-sf" not in arguments:
        arguments = [*arguments, *_take_over(path)]
    config = path.read_text()
    me = find(os.getpid())
    # A signal to the manager's process group must not end HAProxy. Not a separate session: Linux shares the CPUs
    # between sessions (sched_autogroup), and HAProxy then takes the replicas' time: measured with 128 clients on two
    # cores, 7 % fewer requests per second and a p99 of 15 instead of 11 ms.
    with suppress(OSError):
        os.setpgid(0, 0)
    flags = _flags(arguments)
    generations.record(directory, Generation(me, manager, binary, flags, config, generations.now_s()))
    wake_keeper(directory)
    return arguments


def wake_keeper(directory: Path, message: bytes = b"look") -> bool:
    """Sends a message to the keeper of a directory; starts one for `look` if there is none.

    Returns:
        Whether a keeper received the message.
    """
    with socket(AF_UNIX, SOCK_DGRAM) as sock:
        sock.settimeout(1)
        try:
            sock.sendto(message, str(directory / KEEPER_SOCKET))
            return True
        except OSError:
            pass
    if message == b"look":
        # Forked twice, so that it is not a child of HAProxy, which this process becomes and which collects no exit
        # codes.
        starter = "import subprocess, sys; subprocess.Popen(sys.argv[1:], process_group=0)"
        with (directory / "keeper.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", starter, sys.executable, "-P", "-m", KEEPER],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=20,
            )  # fmt: skip
    return False


def _take_over(path: Path) -> list[str]:
    """Returns the arguments to take over from a running HAProxy; its configuration replaces one without pools."""
    directory, config = path.parent, path.read_text()
    socket_path = generations.admin_socket(config, directory)
    pid = running_pid(socket_path)
    if pid is None:
        # One that is alive but does not answer keeps its ports; older ones finish their last requests.
        for generation in generations.recorded(directory)[:1]:
            generation.process.send(signal.SIGKILL)
        return []
    with suppress(OSError):
        last_good = (directory / LAST_GOOD_FILE).read_text()
        if not generations.has_applications(config) and generations.listens_alike(config, last_good):
            path.write_text(last_good)
    return ["-sf", str(pid), "-x", str(socket_path)]


def _flags(arguments: list[str]) -> list[str]:
    """Returns Serve's arguments without the file and those of a takeover."""
    kept: list[str] = []
    skipping = False
    for argument in arguments:
        if argument.startswith("-"):
            skipping = argument in (*_HAND_OVER, "-f")
        if not skipping:
            kept.append(argument)
    return kept
