"""Notes on pools, stored in the cluster's own memory: why the last deployment of a pool failed."""

from maas_ray.ray_internals import kv

_KEY = b"maas-ray:taken-back:"


def note(pool: str, text: str) -> None:
    """Stores a note on a pool; an empty one removes it."""
    if text:
        kv.put(_KEY + pool.encode(), text.encode())
    else:
        kv.delete(_KEY + pool.encode())


def noted(pool: str) -> str:
    """Returns the note on a pool; empty if there is none."""
    found = kv.get(_KEY + pool.encode())
    return "" if found is None else bytes(found).decode()
