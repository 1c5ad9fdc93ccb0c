"""The first process of a host: makes its directories, reaps, and runs units as systemd would. Needs the standard library only.

    python init.py HOSTNAME KEPT_DIRECTORY [SEEN_DIRECTORY …]

The host keeps KEPT_DIRECTORY when it is lost and returns: its home and the units that are enabled there. Of
the machine's own /tmp it sees the directories that are named. It takes one command per connection at /run/init.sock:
`start|stop|restart|enable|is-active UNIT`, and answers with one line.

Of systemd's units it knows what cluster.yaml uses: ExecStart, User (ignored: a host has one), Environment, EnvironmentFile,
Restart, RestartPreventExitStatus, RestartSec, TimeoutStopSec, LimitNOFILE, and that whatever is left of a unit ends with its first process.
"""

import ctypes
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

SOCKET = "/run/init.sock"
UNITS = Path("/etc/systemd/system")
ENABLED = "enabled"
_MARK = "INVOCATION_ID"
_LIBC = ctypes.CDLL(None, use_errno=True)
_REC, _PRIVATE, _BIND = 0x4000, 1 << 18, 0x1000


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    if _LIBC.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def furnish(hostname: str, kept: Path, seen: list[str], sizes: dict[str, str]) -> None:
    """Gives this host its own /tmp, /run, /dev/shm, home, units and /proc."""
    mount("none", "/", flags=_REC | _PRIVATE)
    socket.sethostname(hostname)
    for name in ("home", "units"):
        (kept / name).mkdir(exist_ok=True)
    mount("tmpfs", "/mnt", "tmpfs")
    for number, path in enumerate((*seen, str(kept))):
        Path(f"/mnt/{number}").mkdir()
        mount(path, f"/mnt/{number}", flags=_BIND | _REC)
    for path, size in sizes.items():
        mount("tmpfs", path, "tmpfs", data=f"size={size},mode=1777")
    for number, path in enumerate((*seen, str(kept))):
        Path(path).mkdir(parents=True, exist_ok=True)
        mount(f"/mnt/{number}", path, flags=_BIND | _REC)
    mount("tmpfs", "/run", "tmpfs")
    Path("/run/sshd").mkdir()
    mount("tmpfs", "/home", "tmpfs", data="mode=755")
    Path("/home/maas").mkdir()
    mount(str(kept / "home"), "/home/maas", flags=_BIND)
    UNITS.mkdir(parents=True, exist_ok=True)
    mount(str(kept / "units"), str(UNITS), flags=_BIND)
    for name in ("hosts", "passwd"):
        if (kept / name).exists():
            mount(str(kept / name), f"/etc/{name}", flags=_BIND)
    mount("proc", "/proc", "proc")


class Unit:
    """A service: its first process, and the thread that starts it again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.wanted = False
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self.num_starts = 0

    def settings(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        text = (UNITS / f"{self.name}.service").read_text().replace("\\\n", " ")
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                found.setdefault(key.strip(), []).append(value.strip())
        return found

    def start(self) -> None:
        with self.lock:
            if self.wanted:
                return
            self.settings()  # a unit that is not there is an error of the caller
            self.wanted = True
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def _run(self) -> None:
        while self.wanted:
            settings = self.settings()
            mark = f"{self.name}-{time.monotonic_ns()}"
            with Path(f"/home/maas/{self.name}.log").open("ab") as log, self.lock:
                if not self.wanted:
                    return
                self.process = self._spawn(settings, mark, log)
                self.num_starts += 1
            self.process.wait()
            end_marked(mark)
            settings = self.settings()
            policy, code = settings.get("Restart", ["no"])[-1], self.process.returncode
            is_final = policy == "no" or (policy == "on-failure" and code == 0)
            if is_final or str(code) in settings.get("RestartPreventExitStatus", []):
                self.wanted = False
            pause_end = time.monotonic() + float(settings.get("RestartSec", ["0.1"])[-1].rstrip("s"))
            while self.wanted and time.monotonic() < pause_end:
                time.sleep(0.05)

    def _spawn(self, settings: dict[str, list[str]], mark: str, log) -> "subprocess.Popen[bytes]":
        environ = {"PATH": os.environ["PATH"], "HOME": "/home/maas", "USER": "root", "LANG": "C.UTF-8", _MARK: mark}
        for name in ("PYTHONPATH",):
            if name in os.environ:
                environ[name] = os.environ[name]
        for text in settings.get("Environment", []):
            environ.update(item.split("=", 1) for item in shlex.split(text))
        for path in settings.get("EnvironmentFile", []):
            if path.startswith("-") and not Path(path[1:]).exists():
                continue
            for line in Path(path.removeprefix("-")).read_text().splitlines():
                if "=" in line and not line.startswith("#"):
                    name, value = line.split("=", 1)
                    environ[name] = value.strip('"')
        files = settings.get("LimitNOFILE")

        def limit() -> None:
            if files:  # a container may not raise its own limit, as systemd may
                files_now = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(int(files[-1]), files_now),) * 2)

        return subprocess.Popen(
            shlex.split(settings["ExecStart"][-1]),
            env=environ, cwd="/home/maas", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=limit,
        )  # fmt: skip

    def stop(self) -> None:
        with self.lock:
            self.wanted = False
            process, thread = self.process, self.thread
        if process is not None and process.poll() is None:
            timeout_s = float(self.settings().get("TimeoutStopSec", ["90"])[-1].rstrip("s"))
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
        if thread is not None:
            thread.join(30)


def end_marked(mark: str) -> None:
    """Kills what a unit has left."""
    wanted = f"{_MARK}={mark}\0".encode()
    for _ in range(3):
        found = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and entry.name != "1":
                try:
                    if wanted in (entry / "environ").read_bytes() + b"\0":
                        os.kill(int(entry.name), signal.SIGKILL)
                        found += 1
                except OSError:
                    continue
        if not found:
            return
        time.sleep(0.05)


def reap(units: dict[str, Unit]) -> None:
    """Forgets processes whose parents have died; those of units are waited for by their own thread."""
    while True:
        time.sleep(0.2)
        own = {unit.process.pid for unit in units.values() if unit.process is not None}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z" and fields[1] == "1":
                    os.waitpid(int(entry.name), os.WNOHANG)
            except (OSError, ChildProcessError):
                continue


def answer(units: dict[str, Unit], words: list[str]) -> str:
    verb, names = words[0], [name.removesuffix(".service") for name in words[1:] if not name.startswith("-")]
    for name in names:
        unit = units.setdefault(name, Unit(name))
        if verb in ("stop", "restart", "disable"):
            unit.stop()
        if verb in ("start", "restart") or (verb == "enable" and "--now" in words):
            unit.start()
        if verb == "enable":
            (UNITS / f"{name}.{ENABLED}").touch()
        if verb == "disable":
            (UNITS / f"{name}.{ENABLED}").unlink(missing_ok=True)
        if verb == "is-active":
            return "active" if unit.wanted else "inactive"
        if verb == "starts":
            return str(unit.num_starts)
    return "ok"


def main() -> None:
    hostname, kept, *rest = sys.argv[1:]
    sizes = dict(item.split("=", 1) for item in rest if "=" in item and item.startswith("/"))
    furnish(hostname, Path(kept), [item for item in rest if "=" not in item], sizes)
    os.umask(0o022)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    units: dict[str, Unit] = {}
    threading.Thread(target=reap, args=(units,), daemon=True).start()
    server = socket.socket(socket.AF_UNIX)
    server.bind(SOCKET)
    server.listen(16)
    for path in sorted(UNITS.glob(f"*.{ENABLED}")):
        answer(units, ["start", path.stem])
    sys.stdout.write("ready\n")
    sys.stdout.flush()

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                text = answer(units, connection.recv(4096).decode().split())
            except Exception as error:
                text = f"error: {error}"
            connection.sendall(text.encode() + b"\n")

    while True:
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
