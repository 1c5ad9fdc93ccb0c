"""Settings that a head node publishes in Ray's key-value store for joining machines; readers need the cluster's token.

python -m maas_ray.cluster.members.terms ADDRESS JSON       writes them, in the environment of the cluster
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from maas_ray.cluster.node.environment import PROFILES, Profile
from maas_ray.cluster.node.ray_start import node_variables
from maas_ray.cluster.node.state import ClusterState
from maas_ray.errors import ClusterError
from maas_ray.ray_internals import gcs
from maas_ray.version import __version__

VERSION = 1
_NAMESPACE, _KEY = b"maas-ray", b"cluster/terms"


@dataclass(frozen=True)
class Terms:
    """Settings that all nodes of a cluster share."""

    profile: Profile
    http_port: int
    """Port of each node's front unless a spec sets another."""
    package: str = __version__
    """The head's version of maas-ray."""
    version: int = VERSION


def publish_terms(state: ClusterState, terms: Terms, timeout_s: float) -> None:
    """Writes the terms of a running head node, in a separate process: this one may be connected elsewhere, or never be.

    Raises:
        ClusterError: the head node did not accept them, with the output.
    """
    command = [sys.executable, "-P", "-m", "maas_ray.cluster.members.terms", state.address, json.dumps(asdict(terms))]
    try:
        done = subprocess.run(
            command, env=node_variables(state, timeout_s), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"the head node {state.address} did not store its terms within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise ClusterError(f"the head node {state.address} did not store its terms: {done.stderr.strip()[-500:]}")


def read_terms(address: str, timeout_s: float) -> Terms | None:
    """The terms of the head node at `address`, read with this process's token; None without terms (`cluster.yaml`).

    Raises:
        ClusterError: the terms cannot be read or have another version.
    """
    import ray

    try:
        found = gcs.get(address, _KEY, _NAMESPACE, timeout_s)
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ClusterError(f"cannot read the terms of the cluster {address}: {error}") from error
    if found is None:
        return None
    try:
        document = json.loads(found)
        if document["version"] != VERSION:
            raise ClusterError(
                f"the terms of the cluster {address} have version {document['version']}, this program reads {VERSION}; "
                "install the same version of maas-ray on both machines"
            )
        terms = Terms(**document)
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"cannot read the terms of the cluster {address}: {error}") from error
    if terms.profile not in PROFILES or terms.package != __version__:
        raise ClusterError(
            f"the cluster {address} runs maas-ray {terms.package} with profile {terms.profile!r}, this machine "
            f"{__version__}; install the same version on both machines"
        )
    return terms


def _main(address: str, text: str) -> None:
    gcs.put(address, _KEY, text.encode(), _NAMESPACE, timeout_s=30)


if __name__ == "__main__":
    _main(*sys.argv[1:])
