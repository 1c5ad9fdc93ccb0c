"""Shared fixtures: real stores (a directory; an S3 service over HTTP)."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import requests

from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store

# Set before any Ray worker starts: credentials reach every process through its environment, as on a cluster.
os.environ.update(
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 service (moto) over HTTP on loopback, ended by its own handle."""
    port = unused_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
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
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="maas")
        client.close()
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StorageSpec:
    """The description of an empty store of each kind."""
    if request.param == "file":
        return StorageSpec(uri=f"file://{tmp_path}/store")
    return StorageSpec(
        uri=f"s3://maas/{tmp_path.name}-{time.time_ns()}", endpoint=request.getfixturevalue("s3_endpoint")
    )


@pytest.fixture
def store(storage: StorageSpec) -> ObstoreStore:
    """An empty store of each kind."""
    return open_store(storage)


@pytest.fixture
def file_store(tmp_path: Path) -> ObstoreStore:
    """An empty store in a local directory, for tests in which the kind of store plays no part."""
    return open_store(f"file://{tmp_path}/store")


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nothing listens."""
    return unused_port()


@pytest.fixture(scope="module")
def module_port() -> int:
    """As `free_port`, for a server that a module's tests share."""
    return unused_port()
