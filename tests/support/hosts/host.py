"""One host of a `Network`: run programs on it, cut its link, lose it and let it come back."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

INIT = Path(__file__).with_name("init.py")
BIN = Path(__file__).with_name("bin")
START_S = 20


class Host:
    """A network namespace with the processes, mounts and IPC of a machine of its own.

    Args:
        name: of the host and of its network namespace.
        address: its IPv4 address.
        link: this machine's end of its cable.
        kept: directory of what it keeps when it is lost.
        seen: directories of this machine that it sees although they lie below /tmp.
        env: of all its processes.
    """

    def __init__(
        self, name: str, address: str, link: str, kept: Path, seen: tuple[Path, ...], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.address = address
        self.kept = kept
        self._link = link
        self._seen = seen
        self._env = dict(env)
        self._init: subprocess.Popen[str] | None = None
        self.sizes = {"/tmp": "2g", "/dev/shm": "8g"}
        """Sizes of the file systems that it has for itself, from its next start on."""

    @property
    def home(self) -> Path:
        """Its home, as this machine sees it."""
        return self.kept / "home"

    @property
    def env(self) -> dict[str, str]:
        """Environment of a program that is run on it."""
        path = f"{BIN}:{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": "/home/maas", "USER": "root", "LANG": "C.UTF-8", **self._env}

    @property
    def is_up(self) -> bool:
        """Whether its first process lives."""
        return self._init is not None and self._init.poll() is None

    def boot(self) -> None:
        """Starts it; what it kept is there again, and the units that were enabled start. Call it in the main thread."""
        self.kept.mkdir(parents=True, exist_ok=True)
        sizes = [f"{path}={size}" for path, size in self.sizes.items()]
        # With this process goes the host: the kernel kills it when the thread that started it ends.
        command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.name]
        command += ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc"]
        command += [sys.executable, "-P", str(INIT), self.name, str(self.kept), *map(str, self._seen), *sizes]
        with (self.kept / "init.log").open("ab") as log:
            self._init = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        assert self._init.stdout is not None
        if self._init.stdout.readline().strip() != "ready":
            raise RuntimeError(f"host {self.name} did not start: {(self.kept / 'init.log').read_text()[-2000:]}")

    def lose(self) -> None:
        """Ends all its processes at once, as a power cut does."""
        if self._init is not None:
            if self._init.poll() is None:
                os.kill(self._init.pid, signal.SIGKILL)  # --kill-child ends its first process, and that ends all
            self._init.wait(START_S)
            assert self._init.stdout is not None
            self._init.stdout.close()
            self._init = None

    def command(self, script: str) -> list[str]:
        """The command that runs a shell script on it."""
        return ["nsenter", "--target", str(self.first_pid()), "--mount", "--uts", "--ipc", "--net", "--pid", "--wdns=/home/maas", "bash", "-c", script]  # fmt: skip

    def run(
        self, script: str, *, env: Mapping[str, str] | None = None, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell script on it to its end."""
        done = subprocess.run(
            self.command(script), env={**self.env, **(env or {})}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout_s,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(
                f"{self.name}: {script} → {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def python(self, code: str, *arguments: str, timeout_s: float = 60.0, check: bool = True) -> str:
        """What a Python program prints on it."""
        words = shlex.join([sys.executable, "-P", "-c", code, *arguments])
        return self.run(words, timeout_s=timeout_s, check=check).stdout

    def start(self, script: str, log: str, *, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Runs a shell script on it in the background; its output goes to a file in its home.

        Signals mean there what they do in a terminal, also where the tests themselves run in the background.
        """
        with (self.home / log).open("ab") as out:
            return subprocess.Popen(
                self.command(script), env={**self.env, **(env or {})}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=_heed_interrupts,
            )  # fmt: skip

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one of its processes, named as this machine sees it."""
        os.kill(pid, number)

    def cut(self) -> None:
        """Pulls its cable."""
        subprocess.run(["ip", "link", "set", self._link, "down"], check=True, timeout=START_S)

    def mend(self) -> None:
        """Plugs its cable in again."""
        subprocess.run(["ip", "link", "set", self._link, "up"], check=True, timeout=START_S)

    def first_pid(self) -> int:
        """Its first process, as this machine sees it."""
        if not self.is_up or self._init is None:
            raise RuntimeError(f"host {self.name} is not up")
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        return int(children[0])

    def pids(self, *words: str) -> list[int]:
        """Its processes, as this machine sees them, whose command line has all of these words."""
        own = os.readlink(f"/proc/{self.first_pid()}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if all(word in line for word in words) and os.readlink(entry / "ns" / "pid") == own:
                        found.append(int(entry.name))
                except OSError:
                    continue
        return sorted(found)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
