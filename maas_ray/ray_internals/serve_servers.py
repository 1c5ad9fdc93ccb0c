"""What Serve's own servers have no option for: its gRPC servers, its proxy's table of routes, the app around a replica.

Serve's modules are not imported, but taken from where they are: a process without them has no such server. Each function is
called before Serve starts the server. Read in Ray 2.60.0.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

AddAddress = Callable[[Any, str], None]
"""Binds a gRPC server to `host:port`."""


def replace_internal_port(add: Callable[[Any, str], Any]) -> None:
    """Has a replica call `add` in place of opening the port for calls between deployments."""
    serve = sys.modules.get("ray.serve._private.replica")
    if serve is not None:
        serve.add_port_to_grpc_server = add  # type: ignore[attr-defined]


def replace_grpc_address(add: AddAddress) -> None:
    """Has Serve call `add` where it binds the gRPC server of a replica or a proxy, once."""
    serve = sys.modules.get("ray.serve._private.default_impl")
    if serve is None or serve.add_grpc_address is add:
        return
    serve.add_grpc_address = add  # type: ignore[attr-defined]


def set_grpc_option(name: str, value: int) -> None:
    """Sets an option of the gRPC servers that Serve makes in this process."""
    serve = sys.modules.get("ray.serve._private.constants")
    if serve is not None:
        options = serve.DEFAULT_GRPC_SERVER_OPTIONS
        options[:] = [*(option for option in options if option[0] != name), (name, value)]


def route_unnamed_calls(choose: Callable[[Any], str]) -> None:
    """Has the proxy of this process send gRPC calls that name no application to the one that `choose` names, once.

    Serve refuses them where there are several applications.

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
    """Serve's table of routes, inside its middlewares; None where this is no proxy."""
    while not hasattr(app, "proxy_router"):
        app = getattr(app, "_app", None)
        if app is None:
            return None
    return app.proxy_router


def base_path_of(app: Any) -> Callable[[], str]:
    """Where Serve has put the application of a replica; it may move while the replica lives, so it is asked each time.

    Args:
        app: what Serve gives its middlewares in a replica.
    """
    while not hasattr(app, "__self__"):
        app = app._app  # Serve's own middleware around its replica's bound method
    replica = app.__self__
    return lambda: (replica._route_prefix or "").rstrip("/")
