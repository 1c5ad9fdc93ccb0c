"""maas-ray's handler, app and protocol class in one plain uvicorn process. Arguments: ONNX file, store, port."""

import functools
import sys

import uvicorn

from maas_ray.registry.importing import import_onnx
from maas_ray.registry.models import PRODUCTION, Registry
from maas_ray.serve.http.asgi_app import App
from maas_ray.serve.http.protocol import HttpProtocol
from maas_ray.serve.http.server_state import HttpServerState
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.store.objects import open_store

NAME = "bench"

if __name__ == "__main__":
    path, store_path, port = sys.argv[1:]
    store = open_store(store_path)
    registry = Registry(store)
    registry.promote(NAME, registry.publish(NAME, import_onnx(store, path).bundle_id).version, PRODUCTION)
    described = {"storage": {"uri": store.uri}, "models": [{"name": NAME}], "refresh": {"poll_interval_s": 60.0}}
    spec = ApplicationSpec.model_validate(described)
    handler = Handler(ModelManager(store, spec))
    http = functools.partial(HttpProtocol, shared=HttpServerState(handler, spec.limits))
    uvicorn.run(
        App(handler, spec.limits), http=http, loop="uvloop", host="127.0.0.1", port=int(port), log_level="warning"
    )
