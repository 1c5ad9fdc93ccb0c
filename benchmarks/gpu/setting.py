"""What is trained, by device: a Llama-shaped decoder on random tokens, built by the product's own parts without Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.rows import Table
from maas_ray.data.spec.features import Features
from maas_ray.spec import parse_spec
from maas_ray.train.loop.assemble import build_batches, build_plan, build_train_state
from maas_ray.train.loop.fit import LoopHooks, fit
from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.step import Batches
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.spec.train import TrainSpec

ENDLESS = 1_000_000
"""Steps of a run that is left before its end."""


@dataclass(frozen=True)
class Size:
    """Shape of a decoder and of its batch."""

    layers: int
    heads: int
    width: int
    seq_len: int
    rows: int
    vocab_size: int = 32_000

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.seq_len


@dataclass(frozen=True)
class Setting:
    """The device and the sizes that fit it.

    Attributes:
        device: the only device.
        large: about a billion parameters on a GPU.
        small: for proofs that train several times.
        pairs: turns of each of two sides that are compared.
        steps: steps of a turn.
    """

    device: torch.device
    large: Size
    small: Size
    pairs: int
    steps: int

    @property
    def is_gpu(self) -> bool:
        """Whether the figures are those of a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Returns when the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def choose(device: str) -> Setting:
    """The setting of a device: `cuda`, or `cpu` with shapes that a laptop trains in seconds."""
    if device == "cuda":
        large = Size(layers=18, heads=16, width=2048, seq_len=2048, rows=8)
        return Setting(torch.device("cuda", 0), large, Size(6, 8, 512, 512, 8), pairs=5, steps=5)
    tiny = Size(layers=2, heads=2, width=64, seq_len=32, rows=4, vocab_size=256)
    return Setting(torch.device("cpu"), tiny, tiny, pairs=3, steps=3)


def spec_of(size: Size, **fields: Any) -> TrainSpec:
    """The spec of a run with this model; `fields` are other parts of the spec."""
    content: dict[str, Any] = {
        "run": "gpu",
        "model": {"name": "decoder", "params": {"layers": size.layers, "heads": size.heads, "width": size.width}},
        "data": {"uri": "random.txt", "format": "text", "task": "language_modeling", "text": {"seq_len": size.seq_len}},
        "optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.1},
        "max_grad_norm": 1.0,
        "batch": {"global_size": size.rows},
        "steps": ENDLESS,
        "log_every": ENDLESS,
        "checkpoint": {"every_steps": ENDLESS},
        **fields,
    }
    return parse_spec(TrainSpec, content)


def tokens_of(size: Size, num_rows: int = 64) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random token ids [N, T] and, as their targets, the following ones."""
    ids = np.random.default_rng(0).integers(0, size.vocab_size, (num_rows, size.seq_len + 1))
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


class Trainer:
    """One rank's training, as a worker of the product builds it, a few steps at a time.

    Args:
        setting: the device.
        size: the model.
        fields: parts of the spec.
    """

    def __init__(self, setting: Setting, size: Size, **fields: Any) -> None:
        self.setting, self.size = setting, size
        self.spec = spec_of(size, **fields)
        ids, targets = tokens_of(size)
        self.features = Features.model_validate(
            {
                "columns": [
                    {
                        "kind": "tokens",
                        "name": "text",
                        "length": size.seq_len,
                        "vocab_size": size.vocab_size,
                        "tokenizer": "0" * 64,
                    }
                ],
                "task": "language_modeling",
                "target": "text",
            }
        )
        coordinates = rank_coordinates(self.spec.parallelism.resolve(1), setting.device.type)
        self.state: TrainState = build_train_state(self.spec, self.features, len(ids), coordinates, setting.device)
        self.plan: LoopPlan = build_plan(self.spec, len(ids))
        self.loader = Loader.over(
            Table([ids], targets), seed=self.spec.seed, global_batch=size.rows, rank=0, world=1, accumulation_steps=1
        )
        self.done = 0
        self._batches: Any = None

    def __enter__(self) -> "Trainer":
        self._batches = build_batches(self.spec, self.plan, self.loader, self.done, self.setting.device)
        self._ready: Batches = self._batches.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.__exit__(*error)

    def advance(self, steps: int, save: Callable[[int], None] | None = None) -> None:
        """Trains on through the product's loop; `save` is called after the last step, with the number of steps done."""
        hooks = _Until(self.done + steps, save)
        fit(self.plan, self.state, self._ready, self.done, hooks)
        self.done += steps

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all weights, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.state.parts[0].state_dict().items()}


class _Until(LoopHooks):
    """Leaves the loop after a step."""

    def __init__(self, last: int, save: Callable[[int], None] | None) -> None:
        self._last, self._save = last, save

    def should_leave(self, done: int) -> bool:
        return done == self._last

    def save(self, done: int) -> None:
        if self._save is not None:
            self._save(done)
