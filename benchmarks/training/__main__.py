"""Measures training against plain PyTorch and bare Ray Train on this machine, and prints the tables of docs/benchmarks.md.

    python -m benchmarks.training                                      steps, start and checkpoints
    python -m benchmarks.training --sections text --text input.txt     nanoGPT's CPU recipe on any text
    python -m benchmarks.training --sections images --images images-idx3-ubyte.gz

Ours and a peer take turns (where steps are compared both run at once, some seconds each, see turns.py), and a ratio is
the median over those pairs; a run that ends before its last turn keeps fewer, which the notes say. Every side has the same model, rows, order,
number of ranks and one thread per rank; Ray's workers run at the usual niceness in a cluster of `maas-ray up`.

Sections: steps (a step against the plain script under torchrun, DDP and FSDP2; with --text also of a decoder), start
(command to first step), text, images, titan (a decoder against a script composed in torchtitan's order; needs --text),
checkpoints (steps of a run beside a save against those without; saving by itself), data (a table of --gigabytes, prepared and
trained from: memory of every process, rates; it needs four times as much disk below TMPDIR).
"""

import argparse
import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import maas_ray
from benchmarks.options import names
from benchmarks.serving.measure import foreign_cpus
from benchmarks.serving.ours import short_directory
from benchmarks.serving.peers import machine
from benchmarks.training import ours
from benchmarks.training.sections import SECTIONS, Bench, Settings
from benchmarks.training.table import markdown

DEFAULT = ("steps", "start", "checkpoints")
OUTPUT = Path(__file__).parents[1] / "results" / "training.json"


def main() -> int:
    """The command."""
    options = _options()
    if options.table:
        print(markdown(json.loads(options.output.read_text())))
        return 0
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": {"maas-ray": maas_ray.__version__, **{name: version(name) for name in ("ray", "torch")}},
        "settings": {"pairs": options.pairs, "steps": options.steps, "megabytes": options.megabytes},
        "foreign_cpus": foreign_cpus(),
    }
    settings = Settings(options.pairs, options.steps, _absolute(options.text), _absolute(options.images), options.megabytes, options.gigabytes)  # fmt: skip
    try:
        with short_directory() as directory, ours.cluster(directory, num_cpus=2) as home:
            for section in options.sections:
                results["foreign_cpus"] = max(results["foreign_cpus"], foreign_cpus())
                SECTIONS[section](Bench(settings, directory, home, results))
    except KeyboardInterrupt:
        return 130
    finally:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(markdown(results))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--sections", type=names(SECTIONS), default=DEFAULT, help="comma-separated")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each of two sides")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run of the sections steps, titan and data")
    parser.add_argument("--text", type=Path, help="a text file for the language models")
    parser.add_argument("--images", type=Path, help="images in IDX format, their labels beside them")
    parser.add_argument("--megabytes", type=int, default=256, help="of the state that is saved by itself")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of the table of the section data")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file of all figures")
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run's --output")
    return parser.parse_args()


def _absolute(path: Path | None) -> Path | None:
    return path.expanduser().absolute() if path is not None else None


if __name__ == "__main__":
    sys.exit(main())
