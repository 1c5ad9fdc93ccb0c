"""Notes on pools in the cluster's own memory: why the last deployment of each did not get there, if it did not."""

_KEY = b"maas-ray:taken-back:"


def note(pool: str, text: str) -> None:
    """Keeps a note on a pool; an empty one removes it."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    if text:
        _internal_kv_put(_KEY + pool.encode(), text.encode(), overwrite=True)
    else:
        _internal_kv_del(_KEY + pool.encode())


def noted(pool: str) -> str:
    """The note on a pool; empty if there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(_KEY + pool.encode())
    return "" if found is None else bytes(found).decode()
