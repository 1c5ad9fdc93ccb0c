"""Proves and measures training on one GPU, without Ray and without a network, in a few minutes.

    python -m benchmarks.gpu                       on the first GPU; on the CPU, with tiny shapes, where there is none
    python -m benchmarks.gpu --sections resume,save

Every section stands alone: one that fails says why in the table and the others still run; none begins after --budget-s.
Needs torch >= 2.10, numpy, pyarrow, pydantic, obstore and safetensors; the section export also onnx, onnxscript and
onnxruntime.
"""

import argparse
import datetime
import gc
import json
import platform
import sys
import time
import traceback
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.sections import SECTIONS, Line
from benchmarks.gpu.setting import choose
from benchmarks.options import names

OUTPUT = Path(__file__).parents[1] / "results" / "gpu.json"


def main() -> int:
    """The command; its status is 1 if a line misses its goal or a section failed."""
    options = _options()
    setting = choose(options.device)
    torch.set_num_threads(options.threads)
    began_s, lines, seconds = time.monotonic(), list[Line](), {}
    for name in options.sections:
        if time.monotonic() - began_s > options.budget_s:
            lines.append(Line(f"section {name}", f"left out: {options.budget_s:g} s have passed", "runs", False))
            continue
        section_s = time.monotonic()
        try:
            for line in SECTIONS[name](setting):
                lines.append(line)
                print(_row(line), flush=True)
        except Exception as error:
            traceback.print_exc()
            lines.append(Line(f"section {name}", f"{type(error).__name__}: {str(error)[:200]}", "runs", False))
        gc.collect()
        if setting.is_gpu:
            torch.cuda.empty_cache()
        seconds[name] = time.monotonic() - section_s
    results = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(0) if setting.is_gpu else platform.processor() or platform.machine(),
        "versions": {name: _version(name) for name in ("maas-ray", "torch", "numpy", "pyarrow", "obstore")},
        "seconds": seconds,
        "lines": [asdict(line) for line in lines],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{results['device']}, torch {torch.__version__}, {results['date']}\n")
    print("| what | value | must hold | holds |\n|---|---|---|---|")
    print("\n".join(map(_row, lines)))
    return int(any(line.is_met is False for line in lines))


def _row(line: Line) -> str:
    holds = {True: "yes", False: "NO", None: ""}[line.is_met]
    return f"| {line.name} | {line.value} | {line.goal} | {holds} |"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--sections", type=names(SECTIONS), default=tuple(SECTIONS), help="comma-separated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--budget-s", type=float, default=420, help="no section begins later")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file of all figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
