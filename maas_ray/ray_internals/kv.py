"""Ray's key-value store in the head's memory, of the cluster that this process is connected to. Imports Ray when asked.

Ray has no public store of small values that outlives the process which wrote them; an actor would be one more process.
Read in Ray 2.60.0: `ray.experimental.internal_kv`.
"""


def put(key: bytes, value: bytes, namespace: bytes | None = None) -> None:
    """Writes a value, over one that is there."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=True, namespace=namespace)


def get(key: bytes, namespace: bytes | None = None) -> bytes | None:
    """The value of a key; None if there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    found: bytes | None = _internal_kv_get(key, namespace=namespace)
    return found


def delete(key: bytes, namespace: bytes | None = None) -> None:
    """Removes a key; one that is not there is no error."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key, namespace=namespace)


def keys(prefix: bytes, namespace: bytes | None = None) -> list[bytes]:
    """All keys that begin so."""
    from ray.experimental.internal_kv import _internal_kv_list

    found: list[bytes] = _internal_kv_list(prefix, namespace=namespace)
    return found
