"""Keeper: supervises HAProxy and restarts it when it dies, whether or not Serve's manager of it is alive.

There is one keeper for each configuration directory, started by the launcher (`haproxy.succession`), with that
directory as its working directory. It reads the launcher's records of HAProxy processes, and asks the admin socket
which of them is running. Serve's manager cannot reload an HAProxy that it did not start, so the manager is ended once
the keeper's HAProxy runs; Serve then starts another manager, whose HAProxy takes over the sockets. Without a manager
and without any reachable server, Serve has ended, and the keeper ends as well.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from select import select
from socket import AF_UNIX, SOCK_DGRAM, create_connection, socket

from maas_ray.haproxy import generations
from maas_ray.haproxy.admin import running_pid
from maas_ray.haproxy.generations import Generation
from maas_ray.haproxy.names import KEEPER_SOCKET, LAST_GOOD_FILE
from maas_ray.haproxy.process import find
from maas_ray.haproxy.silent import free_requests
from maas_ray.haproxy.succession import is_manager
from maas_ray.process.private_files import write_private

TICK_S = 0.5
"""Seconds between two checks of HAProxy; its death is detected immediately."""
START_S = 5.0
"""Seconds in which a started HAProxy must answer on its admin socket."""
ANSWER_S = 2.0
"""Time limit of a response on the admin socket."""
MAX_SILENT = 3
"""Consecutive failed responses before HAProxy is killed: some 7 s. It then serves nothing, and its watchdog failed."""
ALONE_S = 15.0
"""Seconds without a manager and without a reachable server after which Serve counts as ended: it starts a manager in
less time. Applies if HAProxy was killed before, as in Serve's own shutdown."""
LOST_S = 300.0
"""The same if HAProxy was not killed: a node may lose all its processes at once and get new ones."""
MANAGER_END_S = 1.0
"""Seconds for a manager that ended HAProxy on purpose to end itself."""
DRAIN = b"drain"
"""Message after which HAProxy answers its current requests and ends."""


class Keeper:
    """Keeper of one directory.

    Args:
        directory: directory of the configuration, the admin socket and the launcher's records.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._current: Generation | None = None
        self._watch: int | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._num_silent = 0
        self._was_stopped = False
        self._num_restarts = 0
        self._alone_since: float | None = None
        self._manager_ends_at: float | None = None
        self._is_draining = False
        self._born_s = generations.now_s()

    def run(self) -> None:
        """Supervises HAProxy until Serve has ended, or until a drain was requested."""
        with (self._directory / "keeper.lock").open("w") as lock, socket(AF_UNIX, SOCK_DGRAM) as sock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another keeper is running
            path = self._directory / KEEPER_SOCKET
            path.unlink(missing_ok=True)
            sock.bind(str(path))
            path.chmod(0o600)
            try:
                while self._look():
                    self._wait(sock)
            finally:
                path.unlink(missing_ok=True)

    def _look(self) -> bool:
        """Makes one check; returns False once nothing is left to supervise."""
        for child in self._children:
            child.poll()
        self._identify()  # also after a death: another HAProxy may already have taken over
        current = self._current
        if current is None:
            return self._is_one_starting()
        if not current.process.is_alive and not self._is_one_starting():
            if self._is_draining or not self._is_wanted(current):
                return self._end()
            self._restart(current)
        self._end_useless_manager()
        self._free_silent()
        return self._is_draining or not self._is_abandoned() or self._end()

    def _identify(self) -> None:
        """Finds out which HAProxy answers; that one is supervised."""
        known = generations.recorded(self._directory)
        if not known or self._is_stopped():
            return
        newest = known[0]
        pid = running_pid(generations.admin_socket(newest.config, self._directory), ANSWER_S)
        if pid is None:
            self._count_silence()
            return
        self._num_silent = 0
        for generation in known:
            if generation.process.pid == pid and generation.process.is_alive:
                if generation != self._current:
                    self._keep(generation)
            elif not generation.process.is_alive:
                generations.forget(self._directory, generation)

    def _keep(self, generation: Generation) -> None:
        self._current = generation
        if self._watch is not None:
            os.close(self._watch)
        self._watch = None
        with suppress(OSError):
            self._watch = os.pidfd_open(generation.process.pid)
        if generations.has_applications(generation.config) and not generation.is_leaving:
            write_private(self._directory / LAST_GOOD_FILE, generation.config)

    def _is_stopped(self) -> bool:
        """Whether a signal has stopped HAProxy; it is continued at the second check, since nothing else can serve."""
        current = self._current
        if current is None or current.process.state != "T":
            self._was_stopped = False
            return False
        if self._was_stopped:
            self._say(f"HAProxy {current.process.pid} was stopped by a signal; continuing it")
            current.process.send(signal.SIGCONT)
        self._was_stopped = True
        return True

    def _count_silence(self) -> None:
        """Kills an HAProxy that does not answer any more."""
        current = self._current
        if current is None or not current.process.is_alive or self._is_one_starting() or self._is_draining:
            return
        self._num_silent += 1
        if self._num_silent >= MAX_SILENT:
            self._say(f"HAProxy {current.process.pid} does not answer; killing it")
            current.process.send(signal.SIGKILL)

    def _is_one_starting(self) -> bool:
        """Whether a newer HAProxy is alive but still starting; Serve or the keeper has just started it."""
        now, current = generations.now_s(), self._current
        known = generations.recorded(self._directory)
        if current is None:
            return now - self._born_s < START_S or any(generation.process.is_alive for generation in known)
        return any(
            generation.process.is_alive and now - generation.started_s < START_S
            for generation in known
            if generation.started_s > current.started_s
        )

    def _is_wanted(self, dead: Generation) -> bool:
        """Whether an HAProxy is needed in place of this one."""
        return not dead.is_leaving and (is_manager(dead.manager) or _any_answers(dead.config))

    def _restart(self, dead: Generation) -> None:
        if self._num_restarts:
            time.sleep(min(5.0, 0.1 * 2**self._num_restarts))
        file = self._directory / LAST_GOOD_FILE
        write_private(file, dead.config)
        if (states := generations.state_file(dead.config)) is not None:
            states.unlink(missing_ok=True)  # outdated: servers count as up until a check fails
        command = [dead.binary, *dead.flags, "-f", str(file)]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        self._children = [*(one for one in self._children if one.poll() is None), child]
        process, started_s = find(child.pid), generations.now_s()
        successor = Generation(process, dead.manager, dead.binary, dead.flags, dead.config, started_s)
        generations.record(self._directory, successor)
        generations.forget(self._directory, dead)
        answers_at = generations.admin_socket(dead.config, self._directory)
        while child.poll() is None and generations.now_s() - started_s < START_S:
            if running_pid(answers_at, ANSWER_S) == child.pid:
                self._keep(successor)
                self._num_restarts = 0
                self._manager_ends_at = generations.now_s() + MANAGER_END_S
                self._say(f"HAProxy {dead.process.pid} died; {child.pid} has replaced it")
                return
            time.sleep(0.01)
        self._num_restarts += 1
        self._say(f"HAProxy did not start; attempt {self._num_restarts}")
        successor.process.send(signal.SIGKILL)
        self._current = successor  # dead as well: the next check retries

    def _end_useless_manager(self) -> None:
        """Ends a manager whose HAProxy died: all its reloads would fail, and clients would reach only old replicas."""
        if self._manager_ends_at is None or self._current is None or generations.now_s() < self._manager_ends_at:
            return
        self._manager_ends_at = None
        # A newer manager, whose own HAProxy took over the sockets, can reload it.
        manager = self._current.manager
        if self._is_ours(self._current) and is_manager(manager):
            self._say(f"ending Serve's manager {manager.pid}: it cannot reload an HAProxy that it did not start")
            manager.send(signal.SIGKILL)

    def _free_silent(self) -> None:
        """Makes HAProxy repeat the requests that a silent replica holds."""
        current = self._current
        if current is None or self._num_silent or self._was_stopped or not current.process.is_alive:
            return
        for server, num_requests in free_requests(
            generations.admin_socket(current.config, self._directory), ANSWER_S
        ).items():
            self._say(f"{server} is silent; sending its {num_requests} requests to other replicas")

    def _is_abandoned(self) -> bool:
        current = self._current
        if current is None or is_manager(current.manager) or _any_answers(current.config):
            self._alone_since = None
            return False
        now = generations.now_s()
        self._alone_since = self._alone_since or now
        return now - self._alone_since > (ALONE_S if self._is_ours(current) else LOST_S) and not self._is_one_starting()

    def _is_ours(self, generation: Generation) -> bool:
        """Whether the keeper started it, in place of one that died."""
        return any(child.pid == generation.process.pid for child in self._children)

    def _end(self) -> bool:
        if self._current is not None:
            self._current.process.send(signal.SIGTERM)
            self._say("Serve has ended; no HAProxy is needed any more")
        (self._directory / LAST_GOOD_FILE).unlink(missing_ok=True)
        for generation in generations.recorded(self._directory):
            generations.forget(self._directory, generation)
        return False

    def _wait(self, sock: socket) -> None:
        watched: list[socket | int] = [sock]
        if self._watch is not None and self._current is not None and self._current.process.is_alive:
            watched.append(self._watch)
        ready, _, _ = select(watched, [], [], TICK_S)
        if sock in ready and sock.recv(64) == DRAIN and self._current is not None:
            self._is_draining = True
            self._current.process.send(signal.SIGUSR1)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        sys.stderr.flush()


def _any_answers(config: str) -> bool:
    """Whether any server of a configuration accepts a connection."""
    for address in generations.servers(config):
        with suppress(OSError):
            create_connection(address, timeout=0.3).close()
            return True
    return False


def main() -> int:
    """Runs a keeper in its directory."""
    directory = Path.cwd()
    try:
        Keeper(directory).run()
    except FileNotFoundError:
        if directory.exists():
            raise
        # The cluster has ended, and its directory was removed.
    return 0


if __name__ == "__main__":
    sys.exit(main())
