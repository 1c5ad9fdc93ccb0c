"""An S3 service (moto) whose conditional puts are decided one after the other, as the protocol promises. A program.

moto looks whether the object is there and writes it afterwards: of two requests in two threads both may win.
"""

import io
import threading
from collections.abc import Iterable
from typing import Any

from moto import server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication


class DecidesOneByOne(DomainDispatcherApplication):
    """moto's application; what is conditional holds a lock from the look to the write, and no longer."""

    _deciding = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """WSGI."""
        if "HTTP_IF_NONE_MATCH" not in environ and "HTTP_IF_MATCH" not in environ:
            return super().__call__(environ, start_response)
        # Read before, so that a stalled client blocks no other one.
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        with self._deciding:
            return super().__call__(environ, start_response)


if __name__ == "__main__":
    server.DomainDispatcherApplication = DecidesOneByOne
    server.main()
