"""An S3 service (moto) on this machine that the hosts of a network reach."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from tests.support.hosts.network import Network
from tests.support.root import ROOT

PORT = 5555


@contextmanager
def s3_service(network: Network) -> Iterator[str]:
    """Runs it; gives its URL. Its buckets are gone with it."""
    program = ROOT / "tests" / "support" / "s3_service.py"
    endpoint = f"http://{network.address}:{PORT}"
    with (network.directory / "s3.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, str(program), "-H", network.address, "-p", str(PORT)],
            env={**os.environ, "PYTHONPATH": ""},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(f"{endpoint}/moto-api/", timeout=5)
                break
            except requests.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait(20)
