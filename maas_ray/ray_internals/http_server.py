"""Replaces parts of uvicorn in Serve's replicas and proxies: Serve has no option for its protocol class or sockets.

Read in Ray 2.60.0, which creates `uvicorn.Server(uvicorn.Config(…))` in `ray.serve._private.http_util`.
"""

from collections.abc import Callable
from typing import Any

import uvicorn
import uvicorn.config


def use_protocol(protocol: Callable[..., Any]) -> None:
    """Makes all later servers of this process create a `protocol` for each connection."""
    # uvicorn looks up its protocols by name, and Serve uses the default name.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]


def use_server(server: type[uvicorn.Server]) -> None:
    """Makes Serve create a `server` instead of uvicorn's server, in this process from now on."""
    uvicorn.Server = server  # type: ignore[misc]
