"""Secret that proves to replicas that a request passed the front, on a cluster of several machines.

On one machine everything behind the front listens on loopback. On several it listens on the node's address, reachable
from the whole network, without the front's limits and, with tenants, without their quotas at the front. Therefore every
HAProxy of the cluster adds a header with a secret, and the first layer behind it requires it. The secret is derived
from the token that all nodes already have (HMAC-SHA256, RFC 2104), so nothing must be distributed, and it does not
reveal that token. An attacker who can read the network between the nodes can read the requests as well; the protection
against that is a private network, which Ray's own traffic needs anyway.
"""

import hmac
from collections.abc import Mapping
from pathlib import Path

from maas_ray.haproxy.names import HOST_FILE_VARIABLE

HEADER = "x-maas-front"
_PURPOSE = b"maas-ray: from the front to a replica, 1"


def is_one_machine(environ: Mapping[str, str]) -> bool:
    """Whether the cluster is only on this machine, and everything except its front listens on loopback."""
    return bool(environ.get(HOST_FILE_VARIABLE))


def front_secret(environ: Mapping[str, str]) -> str:
    """Returns 64 hexadecimal digits; empty on one machine, or if the cluster requires no token.

    Args:
        environ: environment of a process of the cluster.

    Raises:
        OSError: the cluster requires a token, and its file cannot be read.
    """
    if is_one_machine(environ) or environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    return hmac.new(_token(environ).encode(), _PURPOSE, "sha256").hexdigest()


def _token(environ: Mapping[str, str]) -> str:
    # In Ray's order.
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    return (Path(path) if path else Path.home() / ".ray" / "auth_token").expanduser().read_text().strip()
