"""What replicas that follow the registry ask of the store, counted: real `ModelManager` objects over one counted store."""

import asyncio
import tempfile
import time

from benchmarks.store.slow import SlowStore
from maas_ray.registry.models import Registry
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.spec.pools import ServingSpec
from maas_ray.store.objects import open_store
from tests.support.onnx_models import commit_bundle, linear

SECONDS_PER_MONTH = 30 * 86400
S3_GETS_PER_S = 5500
"""What S3 promises for one prefix (docs.aws.amazon.com, "Best practices design patterns")."""
S3_USD_PER_GET = 0.4e-6
"""us-east-1; a question for an object that does not exist costs as much."""


def following(num_replicas: int, is_controlled: bool, looks: int = 5) -> list[float]:
    """Figures of replicas of one pool.

    Args:
        num_replicas: followers.
        is_controlled: whether callers may load and unload (`model_control: explicit`), a second log to follow.
        looks: of each follower.

    Returns:
        Gets and listings per replica and look; milliseconds of CPU of a look.
    """
    with tempfile.TemporaryDirectory() as directory:
        real = open_store(f"file://{directory}/store")
        registry = Registry(real)
        registry.publish("linear", commit_bundle(real, linear()))
        registry.promote("linear", 1)
        store = SlowStore(real)
        spec = ServingSpec.model_validate(
            {"models": [{"name": "linear"}], "model_control": "explicit" if is_controlled else "none",
             "refresh": {"poll_interval_s": 3600.0}}
        )  # fmt: skip
        return asyncio.run(_look(store, spec, num_replicas, looks))


async def _look(store: SlowStore, spec: ServingSpec, num_replicas: int, looks: int) -> list[float]:
    replicas = [ModelManager(store, spec, pool="one") for _ in range(num_replicas)]
    try:
        for replica in replicas:
            await replica.start()
        await replicas[0].refresh()
        store.taken()
        began = time.process_time()
        for _ in range(looks):
            for replica in replicas:
                await replica.refresh()
        spent = time.process_time() - began
        counts, number = store.taken(), num_replicas * looks
        return [counts.gets / number, counts.lists / number, spent / number * 1e3]
    finally:
        for replica in replicas:
            await replica.close()


def bill(num_replicas: int, gets_per_look: float, every_s: float) -> list[float]:
    """Gets per second, their share of what S3 promises for a prefix in percent, and dollars per month."""
    per_s = num_replicas * gets_per_look / every_s
    return [per_s, per_s / S3_GETS_PER_S * 100, per_s * SECONDS_PER_MONTH * S3_USD_PER_GET]
