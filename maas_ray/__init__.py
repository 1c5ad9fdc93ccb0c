"""maas-ray: Model as a Service on Ray. From data to a served HTTP endpoint, each step proven.

    import maas_ray

    maas_ray.connect()
    run = maas_ray.train("jobs/specs/digits.yaml", {"run": "first"})
    run.publish("digits", alias="production")
    pool = maas_ray.serve("deployments/digits.yaml")
    print(pool.client().predict("digits", images).outputs)

Importing this package imports neither torch nor Ray; each name imports what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maas_ray.version import __version__

if TYPE_CHECKING:
    from maas_ray import errors
    from maas_ray.api.clusters import connect, disconnect
    from maas_ray.api.models import import_onnx, list_models, promote
    from maas_ray.api.pools import Pool, serve, serve_all
    from maas_ray.api.runs import Run, evaluate, list_runs, publish, train
    from maas_ray.api.stores import open_store
    from maas_ray.client import AsyncClient, Client, Prediction
    from maas_ray.errors import MaasError
    from maas_ray.train.callbacks.base import Callback

__all__ = [
    "AsyncClient",
    "Callback",
    "Client",
    "MaasError",
    "Pool",
    "Prediction",
    "Run",
    "__version__",
    "connect",
    "disconnect",
    "errors",
    "evaluate",
    "import_onnx",
    "list_models",
    "list_runs",
    "open_store",
    "promote",
    "publish",
    "serve",
    "serve_all",
    "train",
]

_MODULES = {
    "AsyncClient": "maas_ray.client",
    "Callback": "maas_ray.train.callbacks.base",
    "Client": "maas_ray.client",
    "MaasError": "maas_ray.errors",
    "Pool": "maas_ray.api.pools",
    "Prediction": "maas_ray.client",
    "Run": "maas_ray.api.runs",
    "connect": "maas_ray.api.clusters",
    "disconnect": "maas_ray.api.clusters",
    "evaluate": "maas_ray.api.runs",
    "import_onnx": "maas_ray.api.models",
    "list_models": "maas_ray.api.models",
    "list_runs": "maas_ray.api.runs",
    "open_store": "maas_ray.api.stores",
    "promote": "maas_ray.api.models",
    "publish": "maas_ray.api.runs",
    "serve_all": "maas_ray.api.pools",
}
"""Where each name is defined. `errors`, `serve` and `train` are modules; the latter two can be called."""
_SUBMODULES = ("errors", "serve", "train")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"maas_ray.{name}")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
