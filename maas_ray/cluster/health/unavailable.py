"""Models that a pool has and does not serve, as its own index says through a front. Needs no Ray in this process."""

import requests


def unavailable(front: str, route_prefix: str, timeout_s: float) -> tuple[str, ...]:
    """Asks a pool that is awake.

    Args:
        front: URL of the front, such as `http://127.0.0.1:8000`.
        route_prefix: of the pool.
        timeout_s: longest wait.

    Returns:
        A line for each model: name, version and reason. Empty also for another's application, and where nobody answers:
        what a pool says of its models is only more.
    """
    with requests.Session() as session:
        session.trust_env = False  # the cluster's own address is never reached through a proxy
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
