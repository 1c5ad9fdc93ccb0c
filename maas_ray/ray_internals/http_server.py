"""uvicorn, as Serve starts it in a replica and in a proxy: without an option for its protocol class or its sockets.

Read in Ray 2.60.0, which makes `uvicorn.Server(uvicorn.Config(…))` in `ray.serve._private.http_util`.
"""

from collections.abc import Callable
from typing import Any

import uvicorn
import uvicorn.config


def use_protocol(protocol: Callable[..., Any]) -> None:
    """Has the servers that this process starts from now on make a `protocol` for each connection."""
    # uvicorn looks its protocols up by name, and Serve leaves the name at its default.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]


def use_server(server: type[uvicorn.Server]) -> None:
    """Has Serve make a `server` in place of uvicorn's, in this process from now on."""
    uvicorn.Server = server  # type: ignore[misc]
