"""Server in a separate process, whose memory can be measured: `python -m tests.attacks.served STORE FRONT`.

Prints its port, and serves until its standard input ends.
"""

import sys

from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, serve_app

if __name__ == "__main__":
    uri, front = sys.argv[1:]
    store = open_store(uri)
    for server in serve_app(store, app_spec(store, "linear"), front):
        print(server.port, flush=True)  # noqa: T201
        sys.stdin.read()
