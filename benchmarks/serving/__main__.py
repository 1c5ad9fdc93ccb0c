"""Measures maas-ray against other model servers on this machine, and prints the tables of docs/benchmarks.md.

    python -m benchmarks.serving                       everything: about an hour
    python -m benchmarks.serving --quick --workloads tiny --peers triton --clients 32

Every peer is built once in a virtual environment of its own, with pinned versions, below --cache. All get the same
ONNX file, the same bytes, the same CPUs and one engine thread. Ours and one peer take turns, and the ratio is the
median over those pairs; answers are compared with onnxruntime's before and during each measurement. Load comes from
wrk where it is installed (apt-get install wrk), else from a generator in Python, which takes more CPU from everybody.

What a change did to the speed: this checkout against another commit of it, each in a cluster of its own, in turns:

    python -m benchmarks.serving --sections pairs --workloads tiny,mid,image --pairs 21 --seconds 2 --peers ours@HEAD~1

REVISION is one that git knows here, or the directory of a checkout, whose files are used as they are; more than one may
be given, and other servers beside them. `ours@.` is this checkout against itself: it shows how far apart two equal sides
come out on this machine. The table gives the ratio of the requests per second and of the CPU time that all processes of
a cluster use for a request, with the interval in which the true median is with a probability of 95 %.

Sections: pairs (closed loop against peers), raw (encoder against onnxruntime alone), overload (open loop at 2 and 10
times capacity), memory, duties (our replica against a bare protocol class in one, both behind HAProxy), direct (the same
two without Ray and HAProxy).
"""

import argparse
import datetime
import json
import os
import signal
import sys
from pathlib import Path

import maas_ray
from benchmarks.options import names
from benchmarks.serving import commits, environments, ours
from benchmarks.serving.load.closed import has_wrk
from benchmarks.serving.measure import Bench, DeadlinePassed, Settings, new_results
from benchmarks.serving.peers import PEERS, machine
from benchmarks.serving.table import markdown
from benchmarks.serving.workloads import WORKLOADS

SECTIONS = ("pairs", "raw", "overload", "memory", "duties", "direct")
OUTPUT = Path(__file__).parents[1] / "results" / "serving.json"


def main() -> int:
    """The command."""
    options = _options()
    if options.table:
        print(markdown(json.loads(options.output.read_text())))
        return 0
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)  # inherited by every server and by the load
    settings = Settings(
        workloads=options.workloads,
        peers=options.peers,
        clients=options.clients,
        pairs=options.pairs or (3 if options.quick else 7),
        seconds=options.seconds or (2 if options.quick else 0),
        sections=options.sections,
        cache=options.cache,
        deadline_s=options.deadline_s,
        pauses=not options.no_pause,
        pool=options.pool,
    )
    results = new_results()
    results |= {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "maas_ray": maas_ray.__version__,
        "machine": machine(),
        "settings": {
            "pairs": settings.pairs,
            "seconds": settings.seconds,
            "load": "wrk, 1 thread" if has_wrk() else "Python generator",
            "pauses_the_other": settings.pauses,
            "pool": settings.pool,
        },
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # every `finally` runs
    try:
        with ours.short_directory() as directory:
            Bench(settings, directory, results).run()
    except DeadlinePassed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; every server was ended", file=sys.stderr)
        return 130
    finally:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(markdown(results))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--workloads", type=names(WORKLOADS), default=tuple(WORKLOADS), help="comma-separated")
    parser.add_argument("--peers", type=_peers, default=tuple(PEERS), help=f"comma-separated: {', '.join(PEERS)}, and {commits.PREFIX}REVISION")  # fmt: skip
    parser.add_argument("--sections", type=names(SECTIONS), default=SECTIONS, help="comma-separated")
    parser.add_argument(
        "--clients", type=_numbers, default=(), help="closed-loop clients; default: each workload's own"
    )
    parser.add_argument("--pairs", type=int, help="turns of each of two servers (7; quick: 3)")
    parser.add_argument("--seconds", type=int, help="of one turn (4, of slow models more; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns: a first impression")
    parser.add_argument("--cpus", type=_numbers, default=(), help="CPUs for servers and load together; default: all")
    parser.add_argument(
        "--pool", type=json.loads, default={}, help="JSON: settings of our pool other than the defaults"
    )
    parser.add_argument("--cache", type=Path, default=environments.default_cache(), help="directory of the peers' environments")  # fmt: skip
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file of all figures")
    parser.add_argument("--deadline-s", type=float, default=7200.0, help="longest time of the whole run")
    parser.add_argument("--no-pause", action="store_true", help="let the other server run on while one is measured")
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run's --output")
    return parser.parse_args()


def _peers(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    names((*PEERS, *(name for name in found if name.startswith(commits.PREFIX))))(text)
    try:
        for name in found:
            if name.startswith(commits.PREFIX):
                commits.check(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
