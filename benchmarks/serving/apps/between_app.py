"""direct_app.py behind a front, protected in one of three ways. Arguments: ONNX file, store, port, way, certificate, key.

open      nobody is asked
secret    the front's header is asked for, as on a cluster of several machines
tls       TLS between front and replica
"""

import functools
import os
import sys

import uvicorn

from maas_ray.registry.importing import import_onnx
from maas_ray.registry.models import PRODUCTION, Registry
from maas_ray.serve.front.replica_access import FrontOnly, front_check
from maas_ray.serve.http.asgi_app import App
from maas_ray.serve.http.protocol import HttpProtocol
from maas_ray.serve.http.server_state import HttpServerState
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.store.objects import open_store

NAME = "bench"

if __name__ == "__main__":
    path, store_path, port, way, certificate, key = sys.argv[1:]
    store = open_store(store_path)
    registry = Registry(store)
    registry.promote(NAME, registry.publish(NAME, import_onnx(store, path).bundle_id).version, PRODUCTION)
    described = {"storage": {"uri": store.uri}, "models": [{"name": NAME}], "refresh": {"poll_interval_s": 60.0}}
    spec = ApplicationSpec.model_validate(described)
    handler = Handler(ModelManager(store, spec))
    front, app = HttpServerState(handler, spec.limits), App(handler, spec.limits)
    if way == "secret":
        check = front_check(os.environ)
        if check is None:
            raise SystemExit("no secret: RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_SERVE_ENABLE_HA_PROXY must be set")
        front.is_from_front, app = check, FrontOnly(app, check)
    tls = {"ssl_certfile": certificate, "ssl_keyfile": key} if way == "tls" else {}
    uvicorn.run(
        app, http=functools.partial(HttpProtocol, shared=front), loop="uvloop", host="127.0.0.1", port=int(port),
        log_level="warning", **tls,
    )  # fmt: skip
