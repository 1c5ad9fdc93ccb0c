"""One scrape of a pool: bytes of the answers of its replicas and of the text, and CPU time to make it, by the real code."""

import asyncio
import gzip
import pickle
from typing import Any

from benchmarks.scale import cpu
from maas_ray.serve.http.scrape import scrape
from maas_ray.serve.request.peers import Answers, collect
from maas_ray.serve.telemetry.prometheus import exposition
from maas_ray.serve.telemetry.stats import OUTCOMES, ReplicaStats

GZIP = [(b"accept-encoding", b"gzip")]
SHAPES = (
    *((models, 1, share) for models in (1, 30, 300) for share in (0.0, 1.0)),
    (300, 1, 0.1),
    *((1, replicas, 1.0) for replicas in (10, 50, 500)),
    *((30, replicas, share) for replicas in (10, 50, 500) for share in (0.0, 1.0)),
    (300, 10, 1.0),
    (300, 50, 0.1),
)
"""Models, replicas, and the share of the models that was asked for an inference."""


class _Waited:
    arrived_s, queue_s = 0.0, 0.0


def replica(number: int, num_models: int, num_used: int) -> ReplicaStats:
    """Counts of a replica: of its models the first ones have answered 50 requests each, the others none."""
    stats = ReplicaStats("pool-one", f"{number:08x}")
    for index in range(num_models):
        model = stats.loaded(f"customer-model-{index:04d}", 3, 0.4)
        for request in range(50 if index < num_used else 0):
            model.waited([_Waited()], 1e-4 * (request + 1))
            model.ran(1, 1 + request % 8, 2e-4 * (request + 1))
            model.served(1e-5, 1e-5, 4e-4 * (request + 1), 1, 1.7e9)
    for outcome in OUTCOMES:
        stats.answered(f"route-{outcome}", 200)
    return stats


def scraping(num_models: int, num_replicas: int, share_used: float = 1.0) -> list[float]:
    """Figures of a scrape.

    Returns:
        Bytes of what one replica answers, pickled as Ray sends it; milliseconds of its CPU to make it; bytes of the text
        and gzipped; milliseconds of CPU of the replica that answers the scrape: to take the answers in, to make the
        text, and to make it gzipped.
    """
    num_used = round(num_models * share_used)
    peers = [replica(number, num_models, num_used) for number in range(num_replicas)]
    answering = cpu.of_call(peers[0].snapshot) * 1e3
    sent = [pickle.dumps(peer.snapshot(), 5) for peer in peers]

    async def take() -> Answers:
        async def one(data: bytes) -> Any:
            return pickle.loads(data)

        return await collect([one(data) for data in sent], 60.0)

    answers = asyncio.run(take())
    if len(answers) != num_replicas:
        raise RuntimeError(f"{len(answers)} of {num_replicas} answers")
    text = exposition(answers, pool="pool-one")
    return [
        float(len(sent[0])), answering, float(len(text)), float(len(gzip.compress(text, 4))),
        cpu.of_call(lambda: asyncio.run(take()), 3) * 1e3,
        cpu.of_call(lambda: scrape([], answers, pool="pool-one"), 3) * 1e3,
        cpu.of_call(lambda: scrape(GZIP, answers, pool="pool-one"), 3) * 1e3,
    ]  # fmt: skip
