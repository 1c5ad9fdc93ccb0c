"""Measures what grows with nodes, replicas and models: CPU time, bytes and counts, with the law of each. No wall time.

    python -m benchmarks.scale                          all but the real cluster, some five minutes
    python -m benchmarks.scale --sections scraping
    python -m benchmarks.scale.real_cluster 1 4 8 16    a real cluster with so many replicas

HAProxy, its launcher, the keeper's question, Serve's scheduler and autoscaling state, and everything of ours are the real
ones. Replicas are a process that listens on many ports, or snapshots that the real classes made.
"""

import argparse
import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.options import names
from benchmarks.scale import controller, following, front, law, scraping
from benchmarks.serving.peers import machine

REPLICAS = (1, 10, 50, 100, 500)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--sections", type=names(SECTIONS), default=tuple(SECTIONS))
    options = parser.parse_args()
    print(f"{machine()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    for name in options.sections:
        print(f"\n## {name}\n\n{SECTIONS[name]()}", flush=True)


def _configuration() -> str:
    columns = ("bytes", "Serve renders, ms", "hardening, ms", "haproxy -c, ms")
    with tempfile.TemporaryDirectory() as directory:
        rows = [
            [pools, replicas, *front.configuration(Path(directory, f"{pools}-{replicas}"), pools, replicas)]
            for pools, replicas in front.SHAPES
        ]
    of_one = [[row[1], *row[2:]] for row in rows if row[0] == 1]
    table = law.table(("pools", "replicas of each", *columns), rows)
    return f"{table}\n\nOne pool: {law.laws(('servers', *columns), of_one)}"


def _running() -> str:
    columns = ("reload, ms", "checks per s", "us per check", "% of a core", "statistics, bytes", "keeper reads, ms", "HAProxy writes, ms")  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        rows = [[number, *front.running(Path(directory, str(number)), number)] for number in REPLICAS]
    return f"{law.table(('servers', *columns), rows)}\n\n{law.laws(('servers', *columns), rows)}"


def _scheduling() -> str:
    columns = ("placing all, ms", "a look at rest, ms", "a look when uneven, ms", "choosing half to end, ms")
    rows = [[nodes, replicas, *controller.scheduling(nodes, replicas)] for nodes, replicas in controller.SHAPES]
    of_fifty = [row[1:] for row in rows if row[0] == 50]
    table = law.table(("nodes", "replicas", *columns), rows)
    return f"{table}\n\n50 nodes: {law.laws(('replicas', *columns), of_fifty)}"


def _autoscaling() -> str:
    columns = ("a decision, ms", "taking in a report, us", "a report, bytes", "a broadcast, bytes")
    rows = [[number, *controller.autoscaling(number), controller.broadcast_bytes(number)] for number in REPLICAS]
    return f"{law.table(('replicas', *columns), rows)}\n\n{law.laws(('replicas', *columns), rows)}"


def _following() -> str:
    columns = ("gets per look", "listings per look", "CPU of a look, ms")
    counted = [
        [number, control, *following.following(number, control == "explicit")]
        for control in ("none", "explicit")
        for number in (1, 5, 20)
    ]
    paid = [[number, *following.bill(number, 2, 2.0)] for number in REPLICAS]
    bill = law.table(("replicas", "gets per s", "% of S3's limit of a prefix", "dollars per month"), paid)
    return f"{law.table(('replicas', 'model_control', *columns), counted)}\n\n{bill}"


def _scraping() -> str:
    columns = ("an answer, bytes", "to answer, ms", "text, bytes", "gzipped, bytes", "to take in, ms", "to write, ms", "to write gzipped, ms")  # fmt: skip
    rows = [
        [models, replicas, f"{share:.0%}", *scraping.scraping(models, replicas, share)]
        for models, replicas, share in scraping.SHAPES
    ]
    asked = [[row[0] * row[1], *row[3:]] for row in rows if row[2] == "100%"]
    table = law.table(("models", "replicas", "asked", *columns), rows)
    return f"{table}\n\nAll asked, by models times replicas: {law.laws(('pairs', *columns), asked)}"


SECTIONS: dict[str, Callable[[], str]] = {
    "configuration": _configuration,
    "running": _running,
    "scheduling": _scheduling,
    "autoscaling": _autoscaling,
    "following": _following,
    "scraping": _scraping,
}

if __name__ == "__main__":
    main()
