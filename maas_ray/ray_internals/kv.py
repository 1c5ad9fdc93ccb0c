"""Ray's key-value store on the head node of the connected cluster, in memory. Imports Ray late.

Ray has no public store of small values that outlives the process that wrote them; an actor would add a process.
Read in Ray 2.60.0: `ray.experimental.internal_kv`.
"""


def put(key: bytes, value: bytes, namespace: bytes | None = None) -> None:
    """Writes a value; replaces an existing one."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=True, namespace=namespace)


def get(key: bytes, namespace: bytes | None = None) -> bytes | None:
    """The value of a key; None if the key does not exist."""
    from ray.experimental.internal_kv import _internal_kv_get

    found: bytes | None = _internal_kv_get(key, namespace=namespace)
    return found


def delete(key: bytes, namespace: bytes | None = None) -> None:
    """Removes a key, if it exists."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key, namespace=namespace)


def keys(prefix: bytes, namespace: bytes | None = None) -> list[bytes]:
    """All keys with a prefix."""
    from ray.experimental.internal_kv import _internal_kv_list

    found: list[bytes] = _internal_kv_list(prefix, namespace=namespace)
    return found
