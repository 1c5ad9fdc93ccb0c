"""How many connections a server of this process may have, by its open files as well as by its configuration."""

from maas_ray.display import get_logger
from maas_ray.process.open_files import raise_limit

log = get_logger(__name__)

RESERVED_FILES = 512
"""Open files for all the rest: models, the store, Ray, other replicas and gRPC. Where the limit is low, half of it."""


def allowed_connections(wanted: int, where: str) -> int:
    """The number that is configured, or fewer; raises the soft limit of open files to the hard one first.

    A server that accepts more has no file left for a model or the store, and fails in places that have nothing to do with
    the caller.

    Args:
        wanted: what the configuration says.
        where: for the log, which says so if it becomes fewer.
    """
    files = raise_limit()
    possible = files - min(RESERVED_FILES, files // 2)
    if possible < wanted:
        log.warning(
            "%s takes %d connections instead of %d, because its process may have %d open files; raise the hard limit of "
            "`ray start` (ulimit -Hn) for more",
            where,
            possible,
            wanted,
            files,
        )
    return min(wanted, possible)
