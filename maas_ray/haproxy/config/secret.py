"""The secret by which replicas know requests of the front, on a cluster of several machines. Knows no configuration.

On one machine everything behind the front listens on loopback. On several it listens on the node's address, where all
of the network could reach it, past the front's limits and, with tenants, past whatever counts on the front. Every
HAProxy of the cluster therefore adds a header that nobody else knows, and the first layer behind it asks for it. It is
derived from the token that all nodes have already (HMAC-SHA256, RFC 2104), so there is nothing to hand out, and it does not give
that token away to those who see it. Who can read the network between the nodes can read the requests as well; against
that helps a private network, which Ray's own traffic needs anyway.
"""

import hmac
from collections.abc import Mapping
from pathlib import Path

from maas_ray.haproxy.names import HOST_FILE_VARIABLE

HEADER = "x-maas-front"
_PURPOSE = b"maas-ray: from the front to a replica, 1"


def is_one_machine(environ: Mapping[str, str]) -> bool:
    """Whether the cluster is on this machine alone, and everything but its front listens on loopback."""
    return bool(environ.get(HOST_FILE_VARIABLE))


def front_secret(environ: Mapping[str, str]) -> str:
    """64 hexadecimal digits; empty on one machine, or where the cluster asks for no token.

    Args:
        environ: of a process of the cluster.

    Raises:
        OSError: the cluster asks for a token, and its file cannot be read.
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
