"""Up to four hosts on this machine, each with its own network, processes and disk: see `network`."""

from tests.support.hosts.host import Host
from tests.support.hosts.network import MAX_HOSTS, Network, why_not

__all__ = ["MAX_HOSTS", "Host", "Network", "why_not"]
