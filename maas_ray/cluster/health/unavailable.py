"""The models that a pool does not serve, from its repository index over HTTP. Needs no Ray in this process."""

import requests


def unavailable(front: str, route_prefix: str, timeout_s: float) -> tuple[str, ...]:
    """The models that a pool does not serve; the pool must be awake.

    Args:
        front: URL of the front, such as `http://127.0.0.1:8000`.
        route_prefix: route prefix of the pool.
        timeout_s: timeout of the request.

    Returns:
        A line for each model: name, version and reason. Also empty for an application that is no pool of ours and
        without an answer: this information is optional.
    """
    with requests.Session() as session:
        session.trust_env = False  # a cluster's address needs no proxy
        try:
            answer = session.post(f"{front}{route_prefix.rstrip('/')}/v2/repository/index", json={}, timeout=timeout_s)
            rows = answer.json() if answer.status_code == 200 else []
            return tuple(
                f"{row['name']} version {row['version'] or '?'}: {row['reason']}"
                for row in rows
                if row.get("state") == "UNAVAILABLE"
            )
        except (requests.RequestException, ValueError, AttributeError, KeyError, TypeError):
            return ()
