"""sshd on a host, for programs that set machines up over ssh. Keys are made for the occasion."""

import shutil
import subprocess
from pathlib import Path

from tests.support.hosts.host import BIN, Host

SSHD = "/usr/sbin/sshd"
_CONFIG = """\
Port 22
ListenAddress {address}
HostKey {kept}/host_key
AuthorizedKeysFile {kept}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100:30:200
SetEnv PYTHONPATH={python_path}
"""


def why_not() -> str:
    """Why there is no sshd here; empty if there is."""
    missing = [name for name in (SSHD, "ssh", "ssh-keygen", "rsync") if shutil.which(name) is None]
    return f"missing programs: {', '.join(missing)} (Debian: openssh-server, openssh-client, rsync)" if missing else ""


def make_key(path: Path) -> None:
    """Makes a key pair without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)


def start(host: Host, public_key: str) -> None:
    """Starts sshd on a host for holders of this key."""
    make_key(host.kept / "host_key")
    (host.kept / "authorized_keys").write_text(public_key)
    env = host.env
    path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    config = _CONFIG.format(address=host.address, kept=host.kept, python_path=env["PYTHONPATH"])
    # A login shell resets PATH (/etc/profile), so the host's PATH is set where its user would set it.
    (host.home / ".bashrc").write_text(f"export PATH={path}\n")
    (host.kept / "sshd_config").write_text(config)
    host.run(f"{SSHD} -f {host.kept}/sshd_config -E {host.kept}/sshd.log")
