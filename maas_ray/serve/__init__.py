"""Serving bundles over HTTP and gRPC: wire formats, batching, models in memory, replicas and pools.

`maas_ray.serve:build` is the application builder that Serve configs name. `maas_ray.serve(spec)` deploys a pool.
"""

from typing import Any

from maas_ray.process.callable_package import make_callable

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":  # imported on first use: most of this package needs no Ray
        from maas_ray.serve.deploy.pool import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_callable(__name__, "maas_ray.api.pools:serve")
