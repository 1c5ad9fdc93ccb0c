"""Connection limit of a server in this process, from its configuration and from its limit of open files."""

from maas_ray.display import get_logger
from maas_ray.process.open_files import raise_limit

log = get_logger(__name__)

RESERVED_FILES = 512
"""Open files reserved for other uses: models, the store, Ray, other replicas and gRPC. At most half of a low limit."""


def allowed_connections(wanted: int, where: str) -> int:
    """Returns the configured number, or fewer; first raises the soft limit of open files to the hard one.

    A server that accepts more has no file left for a model or the store, and fails in places unrelated to the client.

    Args:
        wanted: configured number.
        where: name of the server for the log message if the number is reduced.
    """
    files = raise_limit()
    possible = files - min(RESERVED_FILES, files // 2)
    if possible < wanted:
        log.warning(
            "%s accepts %d connections instead of %d, because its process may have %d open files; raise the hard limit "
            "of `ray start` (ulimit -Hn) to allow more",
            where,
            possible,
            wanted,
            files,
        )
    return min(wanted, possible)
