"""Hosts, ports and URLs: IPv6 brackets, loopback, exemptions from proxies. Opens no connection."""

from collections.abc import Iterable, MutableMapping
from ipaddress import ip_address
from urllib.parse import urlsplit

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_NO_PROXY = ("no_proxy", "NO_PROXY")


def http_url(host: str, port: int) -> str:
    """`http://host:port`, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reachable_host(host: str) -> str:
    """The address for this machine to reach a server that listens on `host`, which may stand for all addresses."""
    return {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address or name."""
    if host.rstrip(".").lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def host_of(url: str) -> str:
    """The host of a URL, without brackets; empty if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def exempt_from_proxies(environ: MutableMapping[str, str], hosts: Iterable[str] = ()) -> None:
    """Adds loopback and `hosts` to the exemptions from HTTP_PROXY and similar variables; existing ones remain.

    Clients read different spellings (requests and curl: `no_proxy` first; Go and Rust: either), so both get the same
    list.

    Args:
        environ: an environment, changed in place.
        hosts: further names and addresses, such as the cluster's.
    """
    known = [entry.strip() for name in _NO_PROXY for entry in environ.get(name, "").split(",")]
    value = ",".join(dict.fromkeys(entry for entry in (*known, *LOOPBACK_HOSTS, *hosts) if entry))
    for name in _NO_PROXY:
        environ[name] = value
