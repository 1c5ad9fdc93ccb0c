"""Changes of Serve's servers that have no option: gRPC servers, the proxy's routing table, the app around a replica.

Takes Serve's modules from `sys.modules` without an import: a process without them has no such server. Each function is
called before Serve starts the server. Read in Ray 2.60.0.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

AddAddress = Callable[[Any, str], None]
"""Binds a gRPC server to `host:port`."""


def replace_internal_port(add: Callable[[Any, str], Any]) -> None:
    """Makes a replica call `add` instead of opening the port for calls between deployments."""
    serve = sys.modules.get("ray.serve._private.replica")
    if serve is not None:
        serve.add_port_to_grpc_server = add  # type: ignore[attr-defined]


def replace_grpc_address(add: AddAddress) -> None:
    """Makes Serve call `add` to bind the gRPC server of a replica or a proxy; applied once."""
    serve = sys.modules.get("ray.serve._private.default_impl")
    if serve is None or serve.add_grpc_address is add:
        return
    serve.add_grpc_address = add  # type: ignore[attr-defined]


def set_grpc_option(name: str, value: int) -> None:
    """Sets an option of the gRPC servers that Serve creates in this process."""
    serve = sys.modules.get("ray.serve._private.constants")
    if serve is not None:
        options = serve.DEFAULT_GRPC_SERVER_OPTIONS
        options[:] = [*(option for option in options if option[0] != name), (name, value)]


def route_unnamed_calls(choose: Callable[[Any], str]) -> None:
    """Makes the proxy route gRPC calls without an application to the one that `choose` returns; applied once.

    Serve rejects them if several applications exist.

    Args:
        choose: called with Serve's `ProxyRouter`.
    """
    serve = sys.modules.get("ray.serve._private.proxy_router")
    if serve is None or getattr(serve.ProxyRouter.get_handle_for_endpoint, "is_ours", False):
        return
    original = serve.ProxyRouter.get_handle_for_endpoint

    @functools.wraps(original)
    def get_handle(self: Any, target_app_name: str) -> Any:
        return original(self, target_app_name or choose(self))

    get_handle.is_ours = True  # type: ignore[attr-defined]
    serve.ProxyRouter.get_handle_for_endpoint = get_handle


def proxy_router(app: Any) -> Any:
    """Serve's routing table, inside its middlewares; None if this process is no proxy."""
    while not hasattr(app, "proxy_router"):
        app = getattr(app, "_app", None)
        if app is None:
            return None
    return app.proxy_router


def base_path_of(app: Any) -> Callable[[], str]:
    """Returns a function for the current route prefix of a replica's application, which can change at any time.

    Args:
        app: the app that Serve passes to its middlewares in a replica.
    """
    while not hasattr(app, "__self__"):
        app = app._app  # Serve's middleware around the bound method of its replica
    replica = app.__self__
    return lambda: (replica._route_prefix or "").rstrip("/")
