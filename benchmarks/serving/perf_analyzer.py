"""Runs Triton's own load tester, perf_analyzer, against a server; by default against maas-ray's serving code here.

    python -m benchmarks.serving.perf_analyzer
    python -m benchmarks.serving.perf_analyzer --url 127.0.0.1:8000 --model digits -- --concurrency-range 4

The binary comes from the wheel of `tritonclient` 2.46.0, whose build runs on glibc 2.35 (the later ones of
`perf-analyzer` want 2.38), and is linked against CUDA's runtime library and libb64 (Debian: libb64-0d).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.serving import environments, ours, workloads
from benchmarks.serving.peers import MODEL_NAME
from benchmarks.serving.processes import run

PACKAGES = ("tritonclient==2.46.0", "nvidia-cuda-runtime-cu12==12.6.77", "numpy==1.26.4")
FORMATS = ("binary", "json")
TIMEOUT_S = 120.0


def command(cache: Path) -> tuple[list[str], dict[str, str]]:
    """The start of its command line, and the environment that it needs.

    Raises:
        RuntimeError: it does not run here; the message is the loader's.
    """
    python = environments.build(cache, "perf-analyzer", PACKAGES)
    (libraries,) = (python.parent.parent / "lib").glob("python*/site-packages/nvidia/cuda_runtime/lib")
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    binary = python.parent / "perf_analyzer"
    tried = subprocess.run([str(binary), "--version"], env=env, capture_output=True, text=True, timeout=30)
    if "Perf Analyzer" not in tried.stdout + tried.stderr:
        raise RuntimeError(
            f"perf_analyzer does not run here: {tried.stderr.strip()} (Debian: apt-get install libb64-0d)"
        )
    return [str(binary)], env


def analyze(cache: Path, url: str, model: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """One run; its output is in the result's `stdout`."""
    start, env = command(cache)
    return subprocess.run(
        [*start, "-m", model, "-u", url, *arguments], env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def main() -> int:
    """The command; 0 if every run ended well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.perf_analyzer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--url", help="host:port of a running server; default: one is started")
    parser.add_argument("--model", default=MODEL_NAME)
    parser.add_argument("--cache", type=Path, default=environments.default_cache())
    parser.add_argument(
        "arguments", nargs="*", help="passed on; default: short runs over HTTP, binary and JSON tensors"
    )
    options = parser.parse_args()
    if options.url:
        return _report(options.cache, options.url, options.model, options.arguments)
    with ours.short_directory() as directory:
        model = workloads.make_model(workloads.WORKLOADS["tiny"], directory)
        with run("maas-direct", ours.direct(model, directory), directory / "log") as server:
            url = f"127.0.0.1:{server.port}"
            runs = (
                [options.arguments]
                if options.arguments
                else [_short(kind, batch) for kind in FORMATS for batch in (1, 8)]
            )
            return max(_report(options.cache, url, MODEL_NAME, arguments) for arguments in runs)


def _short(kind: str, batch: int) -> list[str]:
    return [
        *("-i", "http", "--async", "--concurrency-range", "1:9:8", "-b", str(batch)),
        *("--input-tensor-format", kind, "--output-tensor-format", kind, "-p", "1000", "-r", "3", "-s", "900"),
    ]


def _report(cache: Path, url: str, model: str, arguments: list[str]) -> int:
    finished = analyze(cache, url, model, arguments)
    print("perf_analyzer", " ".join(arguments), file=sys.stderr)
    print(finished.stdout, finished.stderr)
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())
