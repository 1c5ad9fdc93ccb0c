"""Serving bundles over HTTP and gRPC: wire formats, batching, models in memory, replicas and pools.

`maas_ray.serve:build` is the application builder that Serve configs name.
"""

from typing import Any

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":  # imported when it is asked for: most of this package needs no Ray
        from maas_ray.serve.deploy.pool import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
