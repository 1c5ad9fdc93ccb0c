"""Dropout whose mask depends on (seed, sample, layer, element) alone: not on the rank, the world, the batch or the layout.

torch's own dropout draws from the generator of the process, so another number of ranks is another training. Here each
element's bit is a hash of who it belongs to (a counter-based generator: Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), with the finalizer of SplitMix64 as in data/order.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maas_ray.errors import ModelError

_M1, _M2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
"""SplitMix64's multipliers as int64, which wraps around as uint64 does."""
_BITS = 24
"""Bits of a hash that are compared with the share that is kept: as many as a float32 holds."""


class Samples:
    """Whose rows a forward pass computes.

    Args:
        seed: of the run.
        positions: int64 [B], the rows' places in the endless stream of samples.
    """

    def __init__(self, seed: int, positions: Tensor) -> None:
        digest = sha256(f"dropout/{seed}".encode()).digest()
        self.keys = _mix(positions + int.from_bytes(digest[:8], "little", signed=True))
        self.num_calls: dict[int, int] = {}
        """How often each layer has run for these rows: a layer that is used twice gets two masks."""

    def copy(self) -> "Samples":
        """The same rows with counts of its own."""
        copy = Samples.__new__(Samples)
        copy.keys, copy.num_calls = self.keys, dict(self.num_calls)
        return copy


_current: Samples | None = None


@contextmanager
def samples(seed: int, positions: Tensor) -> Iterator[Samples]:
    """Says whose rows the forward passes inside the block compute."""
    with resumed(Samples(seed, positions)) as now:
        yield now


@contextmanager
def resumed(given: Samples | None) -> Iterator[Samples]:
    """The same for rows that were said before: a pass that is computed again (activation checkpointing)."""
    global _current
    before, _current = _current, given
    try:
        yield given  # type: ignore[misc]
    finally:
        _current = before


def current() -> Samples | None:
    """Whose rows are computed now, with a copy of the counts, to be given to `resumed` later."""
    return None if _current is None else _current.copy()


class SampleDropout(nn.Module):
    """Takes the place of `nn.Dropout`: zeroes a share `p` of the elements in training, and scales up the rest.

    Args:
        p: share of zeroed elements, in [0, 1).
        name: of the layer in the whole model.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.shard: tuple[int, int, int] | None = None
        """(dimension, index, count): the input is piece `index` of `count` along this dimension of the whole activation;
        set where the activations of a layer are cut over ranks."""
        self._key = int.from_bytes(sha256(name.encode()).digest()[:8], "little", signed=True)

    def forward(self, x: Tensor) -> Tensor:
        """From [B, …] to the same shape.

        Raises:
            ModelError: nobody has said whose rows these are, or there are more or fewer of them.
        """
        if not self.training or not self.p:
            return x
        if isinstance(x, DTensor):
            local = self.forward(x.to_local())
            return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False)
        if _current is None or len(_current.keys) != len(x):
            known = "none" if _current is None else len(_current.keys)
            raise ModelError(
                f"the dropout layer {self.name} got {len(x)} rows and knows whose {known} are; it has to see the batch "
                "as its first dimension"
            )
        call = _current.num_calls.get(self._key, 0)
        _current.num_calls[self._key] = call + 1
        rows = _mix(_current.keys.to(x.device) + (self._key + 0x9E3779B9 * call))
        elements = self._elements(x)
        bits = _mix(rows.reshape(-1, *[1] * (x.dim() - 1)) + elements) & ((1 << _BITS) - 1)
        kept = bits >= round(self.p * (1 << _BITS))
        return x * kept.to(x.dtype) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def _elements(self, x: Tensor) -> Tensor:
        """int64 [1, …]: the place of each element in its row of the whole activation, spread out."""
        places = torch.zeros((), dtype=torch.int64, device=x.device)
        for dim in range(1, x.dim()):
            size, start = x.shape[dim], 0
            if self.shard is not None and self.shard[0] % x.dim() == dim:
                _, index, count = self.shard
                size, start = size * count, size * index
            shape = [1] * x.dim()
            shape[dim] = x.shape[dim]
            here = torch.arange(start, start + x.shape[dim], device=x.device).reshape(shape)
            places = places * size + here
        return places * (0x9E3779B97F4A7C15 - (1 << 64))


def replace_dropout(net: nn.Module) -> list[str]:
    """Puts `SampleDropout` in the place of every `nn.Dropout`.

    Returns:
        Names of layers that draw random numbers of their own in another way (such as `nn.Dropout2d`) and stay: they are
        seeded by rank, so that a run repeats exactly on the same layout only.
    """
    left = []
    for name, module in list(net.named_modules()):
        if type(module) is nn.Dropout and name:
            parent, _, key = name.rpartition(".")
            new = SampleDropout(module.p, name)
            new.train(module.training)
            setattr(net.get_submodule(parent), key, new)
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            left.append(name or type(module).__name__)
    return left


def _mix(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014) on int64, modulo 2**64."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _M1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _M2
    return z ^ ((z >> 31) & ((1 << 33) - 1))
