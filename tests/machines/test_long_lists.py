"""A store of 2,301 events behind a network: what each command and each start of a replica reads, counted on a host."""

import json
from collections.abc import Iterator

import boto3
import pytest

from benchmarks.store.filling import Sizes, fill
from maas_ray.store.objects import StorageSpec, open_store
from tests.support.hosts import Network
from tests.support.hosts.s3 import s3_service

MAX_GETS, MAX_S = 20, 1.0
COUNT = """
import json, sys, time
from benchmarks.store.slow import SlowStore
from maas_ray.registry.models import Registry
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.train.records.runs import Runs
uri, endpoint, bundle = sys.argv[1:]
found = {}
for name, ask in {
    "models": lambda store: Registry(store).models(),
    "resolve": lambda store: Registry(store).resolve("model-7"),
    "promote": lambda store: Registry(store).promote("model-7", 2),
    "publish": lambda store: Registry(store).publish("model-7", bundle, token="new"),
    "runs": lambda store: Runs(store).survey(),
}.items():
    store = SlowStore(open_store(StorageSpec(uri=uri, endpoint=endpoint)))
    ask(store)
    found[name] = store.counts.gets
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    env = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
    with Network(1, env) as found:
        yield found


def test_commands_on_a_host_read_at_most_twenty_objects(network: Network):
    with s3_service(network) as endpoint:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="maas")
        client.close()
        storage = StorageSpec(uri="s3://maas/long", endpoint=endpoint)
        bundle = fill(open_store(storage), Sizes(versions=1000, models=300, runs=200, checkpoints=10, unfinished=10))
        said = network.hosts[0].python(COUNT, storage.uri, endpoint, bundle, timeout_s=240)
    found = json.loads(said.strip().splitlines()[-1])
    assert all(gets <= MAX_GETS for gets in found.values()), found
