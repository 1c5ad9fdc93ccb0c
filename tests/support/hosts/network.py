"""A network of hosts on this machine: a bridge, and for each host a network namespace that a cable (veth) joins to it.

This machine is the bridge's own address, from which it reaches every host. Nothing of it outlives `close`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from string import ascii_lowercase

from tests.support.hosts.host import BIN, Host
from tests.support.root import ROOT

MAX_HOSTS = 4
_numbers = count()
_NEEDS = ("ip", "nsenter", "setpriv", "unshare")


def why_not() -> str:
    """Why no network can be made here; empty if one can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in _NEEDS if shutil.which(name) is None]:
        return f"missing programs: {', '.join(missing)} (Debian: iproute2, util-linux)"
    trial = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "a0",
        "type",
        "veth",
        "peer",
        "name",
        "a1",
    ]
    done = subprocess.run(trial, capture_output=True, text=True, timeout=20)
    return "" if done.returncode == 0 else f"the kernel refuses network namespaces: {done.stderr.strip()}"


class Network:
    """Hosts h1, h2, … with the addresses 10.99.<n>.1, .2, …; use it as a context manager.

    Args:
        num_hosts: up to `MAX_HOSTS`.
        env: of all processes of all hosts.
    """

    def __init__(self, num_hosts: int, env: Mapping[str, str] | None = None) -> None:
        if not 1 <= num_hosts <= MAX_HOSTS:
            raise ValueError(f"{num_hosts} hosts; 1 to {MAX_HOSTS}")
        self._tag = f"m{os.getpid()}{ascii_lowercase[next(_numbers) % 26]}"
        self.directory = Path(tempfile.mkdtemp(prefix="net-"))
        self.shared = self.directory / "shared"
        """A directory that every host sees at this path, as a shared file system."""
        self.shared.mkdir()
        self._env = dict(env or {})
        self._num_hosts = num_hosts
        self.hosts: list[Host] = []
        self.address = ""
        """This machine, as the hosts see it."""

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        _sweep()
        bridge = f"{self._tag}b"
        _ip("link", "add", bridge, "type", "bridge")
        taken = subprocess.run(
            ["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=True, timeout=20
        ).stdout
        net = next(number for number in range(1, 255) if f"10.99.{number}." not in taken)
        self.address = f"10.99.{net}.254"
        _ip("addr", "add", f"{self.address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        known = "".join(f"10.99.{net}.{number} {self._tag}h{number}\n" for number in range(1, self._num_hosts + 1))
        passwd = Path("/etc/passwd").read_text()
        prefix = Path(sys.executable).absolute().parents[1]
        seen = tuple(dict.fromkeys(path for path in (ROOT, prefix, self.shared) if path.is_relative_to("/tmp")))
        for number in range(1, self._num_hosts + 1):
            name, link = f"{self._tag}h{number}", f"{self._tag}v{number}"
            address = f"10.99.{net}.{number}"
            _ip("netns", "add", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", bridge, "up")
            for words in (
                ("addr", "add", f"{address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
                ("route", "add", "default", "via", self.address),
            ):
                _ip("-n", name, *words)
            kept = self.directory / f"h{number}"
            kept.mkdir()
            (kept / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            (kept / "passwd").write_text(re.sub(r"(?m)^(root:.*):[^:]*:[^:]*$", r"\1:/home/maas:/bin/bash", passwd))
            env = {"PYTHONPATH": str(ROOT), **self._env}
            host = Host(name, address, link, kept, seen, env)
            self.hosts.append(host)
            host.boot()
            _image(host)

    def close(self) -> None:
        """Ends every host and removes all that was made."""
        for host in self.hosts:
            host.lose()
        _remove(self._tag)
        shutil.rmtree(self.directory, ignore_errors=True)


def _image(host: Host) -> None:
    """What an image of a machine has before Ray comes: the virtual environment, without a pip that would change it."""
    real, copy = Path(sys.executable).absolute().parents[1], host.home / "venv"
    (copy / "bin").mkdir(parents=True)
    (copy / "lib").symlink_to(real / "lib")
    shutil.copy(real / "pyvenv.cfg", copy)
    for program in (real / "bin").iterdir():
        if not program.name.startswith(("pip", "activate")):
            (copy / "bin" / program.name).symlink_to(program)
    (copy / "bin" / "pip").symlink_to(BIN / "apt-get")


def _remove(tag: str) -> None:
    for number in range(1, MAX_HOSTS + 1):
        _ip("netns", "del", f"{tag}h{number}", check=False)
        _ip("link", "del", f"{tag}v{number}", check=False)
    _ip("link", "del", f"{tag}b", check=False)


def _sweep() -> None:
    """Removes the networks of processes that were killed."""
    for path in Path("/sys/class/net").glob("m*b"):
        if (found := re.fullmatch(r"(m(\d+)[a-z])b", path.name)) and not Path("/proc", found[2]).exists():
            _remove(found[1])


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
