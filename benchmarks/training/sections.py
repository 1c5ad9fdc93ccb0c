"""What is measured, one function per section. Each fills its part of the results as it goes."""

import functools
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training import ours, peer, scale
from benchmarks.training.checkpoints import measure_saving
from benchmarks.training.ours import Job, Timed
from benchmarks.training.turns import cpu_s, find_ranks, in_turns

Results = dict[str, Any]
CALM_S = 4.0
"""Pause before a command whose start is timed: the cluster still ends the processes of the one before."""
RANK = "ray::RayTrainWorker"
"""What stands in the command line of our ranks."""
SAMPLE_S = 0.1
"""Time between two looks at the CPU time of ranks."""
LOG_EVERY = 5
"""Steps between two times of a side that computes in turns with another one."""

DIGITS: dict[str, Any] = {
    "model": {"name": "mlp", "params": {"size": 10}},
    "data": {"uri": "sklearn:digits", "task": "classification", "split": {"validation": 0, "test": 0.2}},
    "optimizer": {"name": "adamw", "lr": 1e-5},
    "batch": {"global_size": 64},
    "workers": {"count": 2},
    "checkpoint": {"keep_last": 1},
}
"""Learns slowly: once all rows are learnt by heart, moments are denormal numbers, with which CPUs compute at half speed."""
SMALL: dict[str, Any] = {
    "model": {"name": "convnet", "params": {"size": 2, "dropout": 0.1}},
    "data": {"uri": "sklearn:digits", "task": "classification", "split": {"validation": 0.1, "test": 0.2}},
    "optimizer": {"name": "adamw", "lr": 0.003},
    "batch": {"global_size": 64},
    "steps": 5,
    "log_every": 1,
    "workers": {"count": 2},
}
"""What jobs/specs/digits.yaml trains, stopped after a few steps."""


@dataclass(frozen=True)
class Settings:
    """What the command was given."""

    pairs: int
    steps: int
    text: Path | None
    images: Path | None
    megabytes: int
    gigabytes: float = 5.0


@dataclass(frozen=True)
class Bench:
    """Where a section measures."""

    settings: Settings
    directory: Path
    home: Path
    results: Results


def language_model(text: Path, *, steps: int, workers: int, **layout: int) -> dict[str, Any]:
    """nanoGPT's CPU recipe; see peers/characters.py."""
    return {
        "model": {"name": "decoder", "params": {"layers": 4, "heads": 4, "width": 128}},
        "data": {
            "uri": str(text),
            "format": "text",
            "task": "language_modeling",
            "split": {"validation": 0.1, "test": 0},
            "text": {"seq_len": 64, "stride": 1, "tokenizer": {"kind": "characters"}},
        },
        "optimizer": {"name": "adamw", "lr": 0.001, "betas": [0.9, 0.99], "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 100, "min_lr_ratio": 0.1},
        "max_grad_norm": 1.0,
        "batch": {"global_size": 12},
        "steps": steps,
        "workers": {"count": workers},
        **({"parallelism": layout} if layout else {}),
    }


def measure_steps(bench: Bench) -> None:
    """Steady step time of a run against the plain script under torchrun, at the same time and in turns."""
    points = bench.results.setdefault("steps", [])
    bodies = [("mlp", "ddp", DIGITS), ("mlp", "fsdp2", {**DIGITS, "parallelism": {"dp_shard": 2}})]
    if bench.settings.text is not None:
        held_out_free = language_model(bench.settings.text, steps=1, workers=2)
        held_out_free["batch"] = {"global_size": 32}
        bodies.append(("decoder", "ddp", held_out_free))
        bodies.append(("decoder", "fsdp2", {**held_out_free, "parallelism": {"dp_shard": 2}}))
    for body, layout, fields in bodies:
        fields = {**fields, "steps": bench.settings.steps, "log_every": LOG_EVERY, "schedule": {"name": "constant"}}
        name = f"{body}-{layout}"
        job = ours.write_job(bench.directory, name, fields)
        pairs = _in_turns(bench, job, "plain", functools.partial(peer.plain, is_sharded=layout == "fsdp2"))
        points.append({"body": body, "layout": layout, "pairs": pairs})
        say(f"{body} {layout}", pairs)


def measure_start(bench: Bench) -> None:
    """Time from the command to the first step on a running cluster, in turns."""
    rounds = bench.results.setdefault("start", [])
    job = ours.write_job(bench.directory, "start", SMALL)
    digest = ""
    for number in range(bench.settings.pairs + 1):
        time.sleep(CALM_S)
        mine = ours.train(job, bench.home, f"start-{number}")
        digest = mine.result["data_digest"]
        time.sleep(CALM_S)
        theirs = peer.plain(bench.directory, job, digest)
        time.sleep(CALM_S)
        bare = peer.bare_ray(bench.directory, job, digest, ours.environment(bench.home))
        one = {"ours_s": mine.first_step_s, "plain_s": theirs.first_step_s, "bare_ray_s": bare.first_step_s}
        one["ours_total_s"] = mine.ended - mine.started
        say("start" if number else "start, first on its cluster", one)
        rounds.append({**one, "is_first": not number})


def measure_titan(bench: Bench) -> None:
    """A decoder of the size of torchtitan's debug model, sharded over 2 ranks, against a script in torchtitan's order."""
    if bench.settings.text is None:
        raise SystemExit("the section titan needs --text FILE")
    fields = language_model(bench.settings.text, steps=bench.settings.steps, workers=2, dp_shard=2)
    fields["model"] = {"name": "decoder", "params": {"layers": 6, "heads": 16, "width": 256}}
    fields |= {"batch": {"global_size": 16}, "log_every": LOG_EVERY, "schedule": {"name": "constant"}}
    job = ours.write_job(bench.directory, "titan", fields)
    bench.results["titan"] = {"pairs": _in_turns(bench, job, "titan_order", peer.titan_order)}
    say("decoder in torchtitan's order", bench.results["titan"])


def measure_text(bench: Bench) -> None:
    """nanoGPT's CPU recipe: validation loss, and time of its 2,000 steps against one file of PyTorch, in turns."""
    text = bench.settings.text
    if text is None:
        raise SystemExit("the section text needs --text FILE")
    found = bench.results.setdefault("text", [])
    job = ours.write_job(bench.directory, "text", language_model(text, steps=2000, workers=1) | {"log_every": 10})
    ours.train(job, bench.home, "text-data", {"steps": 101})  # more than warm it up
    pairs, (mine, theirs) = in_turns(
        functools.partial(ours.train, job, bench.home, "text"),
        functools.partial(peer.characters, bench.directory, text, steps=2000, threads=1, seed=0),
        (RANK, "peers/characters.py"),
        ranks=1,
        pairs=bench.settings.pairs,
        log_every=10,
    )
    losses = {"ours_loss": mine.result["metrics"]["validation_loss"], "plain_loss": theirs.result["validation_loss"]}
    found.append({**losses, "pairs": pairs})
    say("text", found[-1])


def measure_images(bench: Bench) -> None:
    """resnet18 on images in IDX format: accuracy on the test split after 3 epochs on 2 ranks."""
    if bench.settings.images is None:
        raise SystemExit("the section images needs --images FILE (IDX images; labels beside it)")
    found = bench.results.setdefault("images", [])
    fields = {
        "model": {"name": "resnet", "params": {"depth": 18, "norm": "batch"}},
        "data": {
            "uri": str(bench.settings.images),
            "task": "classification",
            "split": {"validation": 0, "test": 0.2},
            "cleaning": {"tensor": {"scaling": "min_max"}},
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        "schedule": {"name": "cosine", "warmup_steps": 37},
        "batch": {"global_size": 64},
        "epochs": 3,
        "workers": {"count": 2},
    }
    job = ours.write_job(bench.directory, "images", fields)
    mine = ours.train(job, bench.home, "images-0")
    figures = ours.evaluate(job, "images-0")
    found.append({"accuracy": figures["metrics"]["accuracy"], "total_s": mine.ended - mine.started})
    say("images", found[-1])


def measure_checkpoints(bench: Bench) -> None:
    """Overhead of a checkpoint every 50 steps; then saving by itself.

    In one run, which saves every 100 steps: 50 steps from a save on, in which it is copied, hashed and written, against
    the 50 after them, in time and in CPU time of all threads of the ranks. Two runs are minutes apart, in which a shared
    host changes its speed by more than a save costs.
    """
    found = bench.results.setdefault("checkpoints", {"pairs": []})
    every, pairs = 50, 2 * bench.settings.pairs
    fields = {**DIGITS, "steps": 2 * every * (pairs + 1), "log_every": every, "checkpoint": {"every_steps": 2 * every, "keep_last": 1}}  # fmt: skip
    job = ours.write_job(bench.directory, "saving", fields)
    samples: list[tuple[float, float]] = []
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(ours.train, job, bench.home, "saving")
        ranks = find_ranks(RANK, job.spec.workers.count, time.time(), [run])
        while not run.done():
            if (used_s := cpu_s(ranks)) is not None:  # none once a rank has ended
                samples.append((time.time(), used_s / len(ranks)))
            time.sleep(SAMPLE_S)
    done = run.result().done
    used = dict(zip(done, np.interp(list(done.values()), *zip(*samples, strict=True)), strict=True))
    for saved in range(2 * every, fields["steps"], 2 * every):
        middle, last = saved + every, saved + 2 * every
        found["pairs"].append(
            {
                "with_s": (done[middle] - done[saved]) / every,
                "without_s": (done[last] - done[middle]) / every,
                "with_cpu_s": (used[middle] - used[saved]) / every,
                "without_cpu_s": (used[last] - used[middle]) / every,
            }
        )
    say("checkpoint every 50 steps", found["pairs"])
    _forget(job, "saving")
    found["saving"] = measure_saving(bench.directory, bench.settings.megabytes, bench.settings.pairs)
    say("saving", found["saving"])


def measure_data(bench: Bench) -> None:
    """A table of many gigabytes: prepared by tasks and trained from; memory of every process, rates."""
    found = bench.results["data"] = scale.measure(bench.directory, bench.home, bench.settings.gigabytes, bench.settings.steps)  # fmt: skip
    say("data", {name: value for name, value in found.items() if not name.startswith("rank_")})


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "steps": measure_steps,
    "start": measure_start,
    "text": measure_text,
    "images": measure_images,
    "titan": measure_titan,
    "checkpoints": measure_checkpoints,
    "data": measure_data,
}


def _in_turns(bench: Bench, job: Job, name: str, theirs: Callable[[Path, Job, str], Timed]) -> list[dict[str, float]]:
    """Step times of a run and of a script of peers/, see turns.py."""
    run = job.spec.run
    digest = ours.train(job, bench.home, f"{run}-data", {"steps": LOG_EVERY}).result["data_digest"]
    never = {
        "checkpoint.every_steps": 1000 * bench.settings.steps
    }  # by default one after each epoch; the scripts save none
    pairs, _ = in_turns(
        functools.partial(ours.train, job, bench.home, run, never),
        functools.partial(theirs, bench.directory, job, digest),
        (RANK, f"benchmarks.training.peers.{name}"),
        ranks=job.spec.workers.count,
        pairs=bench.settings.pairs,
        log_every=LOG_EVERY,
    )
    _forget(job, run)
    return pairs


def say(what: str, figures: Any) -> None:
    """Progress for whoever waits."""
    print(what, figures, flush=True)


def _forget(job: Job, run: str) -> None:
    """Removes what a run left: the disk is not part of the figure."""
    shutil.rmtree(Path(job.spec.storage.uri) / "runs" / run, ignore_errors=True)
