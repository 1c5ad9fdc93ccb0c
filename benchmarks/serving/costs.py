"""What each duty of the server costs: CPU time of one small request on the hot path alone, without sockets and without Ray.

    python -m benchmarks.serving.costs                     this checkout, and what it is made of
    python -m benchmarks.serving.costs --other HEAD~1      also this checkout against another commit of it

The 10-20-1 MLP is asked with one JSON row, from 1, 32 and 128 connections that all ask in one turn of the loop. Variants
and commits take turns of 2,000 requests, so that a change of the machine hits all of them; a figure is the median of the
differences (or ratios) within a round, with the interval in which the true median is with a probability of 95 %.
HAProxy, the kernel's sockets and Ray's background threads come on top; `benchmarks.serving --peers ours@REVISION` has them.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.figures import median_interval
from benchmarks.serving import commits, environments, ours, workloads
from benchmarks.serving.peers import APPS
from benchmarks.serving.processes import THREADS, clean_environment

CLIENTS = (1, 32, 128)
REQUESTS = 2_000
"""Of one turn."""
END_TIMEOUT_S = 10.0
DUTIES = {
    "all duties together": ("bare", "ours"),
    "a request id of our own": ("no-ids", "ours"),
    "counts, histograms and their clocks": ("no-counts", "ours"),
    "merged requests that are run again alone, one in a thousand": ("no-checks", "ours"),
    "a deadline that the caller gives": ("ours", "deadline"),
    "an id that the caller gives (each head is parsed)": ("ours", "callers-id"),
    "a line in the access log": ("ours", "access-log"),
}
"""Each is the difference between two variants of apps/hot_path.py."""


class Worker:
    """One process of hot_path.py."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._line()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def cpu_us(self, variant: str, clients: int) -> float:
        """Of one request."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{variant} {clients} {REQUESTS}\n")
        self._process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"hot_path.py ended with {self._process.wait(10)}; its last words are above")
        return line


@contextmanager
def worker(code: commits.Code, model: Path, body: Path, directory: Path) -> Iterator[Worker]:
    """Runs the hot path of a commit."""
    directory.mkdir()
    command = [str(code.python), str(APPS / "hot_path.py"), str(model), str(body), str(directory)]
    environment = {**clean_environment(), **THREADS, "PYTHONPATH": str(code.root)}
    with subprocess.Popen(
        command, env=environment, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        try:
            yield Worker(process)
        finally:
            process.stdin.close()  # the end of its input ends it
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--other", default="", help="a revision, or the directory of a checkout")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each variant")
    parser.add_argument("--cache", type=Path, default=environments.default_cache(), help="directory of environments")
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = stack.enter_context(ours.short_directory())
        tiny = workloads.WORKLOADS["tiny"]
        model = workloads.make_model(tiny, directory)
        body = directory / "body"
        body.write_bytes(workloads.make_requests(tiny, model, 1)[0].body)
        here = stack.enter_context(worker(commits.here(), model, body, directory / "here"))
        print(_table_of_duties(here, options.rounds))
        if options.other:
            (directory / "other").mkdir()
            code = commits.other(f"{commits.PREFIX}{options.other}", directory / "other", options.cache)
            there = stack.enter_context(worker(code, model, body, directory / "there"))
            print(f"\n{_table_of_commits(here, there, options.rounds, code.revision)}")
    return 0


def _table_of_duties(here: Worker, rounds: int) -> str:
    lines = [
        "| CPU microseconds of a request | " + " | ".join(f"{n} in a turn" for n in CLIENTS) + " |",
        "|---|" + "---|" * len(CLIENTS),
    ]
    variants = sorted({variant for pair in DUTIES.values() for variant in pair})
    found = {
        clients: [{name: here.cpu_us(name, clients) for name in variants} for _ in range(rounds)] for clients in CLIENTS
    }
    for name, (less, more) in {"a whole request": ("", "ours"), **DUTIES}.items():
        cells = [_shown([one[more] - one.get(less, 0.0) for one in found[clients]], 2) for clients in CLIENTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_of_commits(here: Worker, there: Worker, rounds: int, revision: str) -> str:
    lines = [
        f"| CPU time of a request, this checkout / {revision} | "
        + " | ".join(f"{n} in a turn" for n in CLIENTS)
        + " |",
        "|---|" + "---|" * len(CLIENTS),
    ]
    cells = []
    for clients in CLIENTS:
        ratios = []
        for index in range(2 * rounds):
            sides = (here, there) if index % 2 == 0 else (there, here)  # who goes first alternates
            used = {side: side.cpu_us("ours", clients) for side in sides}
            ratios.append(used[here] / used[there])
        cells.append(_shown(ratios, 3))
    return "\n".join([*lines, f"| ratio | {' | '.join(cells)} |"])


def _shown(values: list[float], digits: int) -> str:
    low, high = median_interval(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
