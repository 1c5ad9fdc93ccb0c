import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import requests

from maas_ray.errors import StoreDenied
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.store.probe import probe


@pytest.fixture(scope="module")
def checking_endpoint(module_port: int) -> Iterator[str]:
    """An S3 service that checks credentials after the first action (which creates the bucket)."""
    endpoint = f"http://127.0.0.1:{module_port}"
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(module_port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.put(f"{endpoint}/maas", timeout=5)
                break
            except requests.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=20)


_SERVER = """
import os, sys
os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "1"
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


def test_wrong_credentials_are_denied_without_showing_them(checking_endpoint: str) -> None:
    store = open_store(StorageSpec(uri="s3://maas/x", endpoint=checking_endpoint))
    with pytest.raises(StoreDenied, match="check the credentials") as caught:
        probe(store)
    assert "testing" not in str(caught.value)
