"""Response of a scrape: its encoding, and the counts of the replicas that answer if one does not."""

import asyncio
import gzip
from typing import Any

import pytest

from maas_ray.serve.http.scrape import accepts_gzip, scrape
from maas_ray.serve.request.peers import Answers, collect
from maas_ray.serve.telemetry.stats import ReplicaStats


@pytest.mark.parametrize(
    ("values", "accepted"),
    [
        ([], False),
        ([b"gzip"], True),
        ([b"deflate, GZIP;q=0.5"], True),
        ([b"gzip;q=0"], False),
        ([b"gzip; q=0.0, *"], False),
        ([b"*"], True),
        ([b"identity"], False),
        ([b"br", b"gzip"], True),
        ([b"gzip;q=x"], False),
    ],
)
def test_gzip_is_used_where_it_is_accepted(values: list[bytes], accepted: bool) -> None:
    assert accepts_gzip([(b"accept-encoding", value) for value in values]) is accepted


def test_a_compressed_scrape_is_the_same_text() -> None:
    replicas = [ReplicaStats("pool", f"r{index}").snapshot() for index in range(3)]
    plain = scrape([], replicas, pool="pool", num_silent=2)
    packed = scrape([(b"accept-encoding", b"gzip, deflate")], replicas, pool="pool", num_silent=2)
    assert dict(packed.headers)[b"content-encoding"] == b"gzip"
    assert b"content-encoding" not in dict(plain.headers)
    assert gzip.decompress(packed.body) == plain.body
    assert b'maas_replicas_silent{pool="pool"} 2\n' in plain.body


def test_the_answers_of_the_others_do_not_wait_for_a_silent_replica() -> None:
    async def answer(value: Any) -> Any:
        return value

    async def fail() -> Any:
        raise RuntimeError("the replica has ended")

    async def ask() -> Answers:
        return await collect([answer(1), asyncio.sleep(60), fail(), answer(2)], timeout_s=0.1)

    answers = asyncio.run(asyncio.wait_for(ask(), 5))
    assert (list(answers), answers.num_silent) == ([1, 2], 1)
