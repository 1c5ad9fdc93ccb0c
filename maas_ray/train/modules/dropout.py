"""Dropout whose mask depends only on (seed, sample, layer, element), not on rank, world size, batch or layout.

torch's dropout draws from the generator of the process, so that another number of ranks is another training. Here each
element's bit is a hash of seed, sample, layer and element (a counter-based generator: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), with the finalizer of SplitMix64 as in data/loading/order.py.

torch's layers (`nn.Dropout`) are replaced. Third-party modules, above all those of Transformers, call the functions
`dropout` and `scaled_dot_product_attention` of torch.nn.functional, which are replaced while samples are set. A
TorchFunctionMode would be called for every operation of the model, and does not see calls inside torch's functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from maas_ray.data.loading.order import SPLITMIX64_FACTORS, SPLITMIX64_STEP
from maas_ray.errors import ModelError

_STEP, _M1, _M2 = (number - (1 << 64) for number in (SPLITMIX64_STEP, *SPLITMIX64_FACTORS))
"""SplitMix64's constants as int64, which overflows like uint64."""
_BITS = 24
"""Number of bits of a hash that are compared with the kept share: the precision of float32."""
_TORCH: dict[str, Any] = {
    "dropout": functional.dropout,
    "scaled_dot_product_attention": functional.scaled_dot_product_attention,
}

Shard = tuple[int, int, int]
"""(dimension, index, count): a tensor is part `index` of `count` along this dimension of the whole activation."""


class Samples:
    """The samples of a forward pass.

    Args:
        seed: seed of the run.
        positions: int64 [B], positions of the rows in the infinite stream of samples.
    """

    def __init__(self, seed: int, positions: Tensor) -> None:
        digest = sha256(f"dropout/{seed}".encode()).digest()
        self.keys = mix_bits(positions + int.from_bytes(digest[:8], "little", signed=True))
        self.num_calls: dict[int, int] = {}
        """Number of calls of each layer for these rows: a layer that is used twice gets two masks."""
        self.running: list[Running] = []
        """The modules whose forward passes are running, innermost last."""

    def copy(self) -> "Samples":
        """A copy with separate counts."""
        copy = Samples.__new__(Samples)
        copy.keys, copy.num_calls, copy.running = self.keys, dict(self.num_calls), list(self.running)
        return copy


_current: Samples | None = None


@contextmanager
def samples(seed: int, positions: Tensor) -> Iterator[Samples]:
    """Sets the samples of the forward passes inside the block."""
    with resumed(Samples(seed, positions)) as now:
        yield now


@contextmanager
def resumed(given: Samples | None) -> Iterator[Samples]:
    """Restores earlier samples, for a recomputed pass (activation checkpointing)."""
    global _current
    before, _current = _current, given
    _call_ours(given is not None)
    try:
        yield given  # type: ignore[misc]
    finally:
        _current = before
        _call_ours(before is not None)


def current() -> Samples | None:
    """A copy of the current samples, for `resumed`; None without samples."""
    return None if _current is None else _current.copy()


class SampleDropout(nn.Module):
    """Replaces `nn.Dropout`: zeroes a share `p` of the elements in training, and scales up the rest.

    Args:
        p: share of zeroed elements, in [0, 1).
        name: name of the layer in the whole model.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.shard: Shard | None = None
        """Part of the whole activation that the input is, if the activations are split over ranks."""
        self._key = _key_of(name)

    def forward(self, x: Tensor) -> Tensor:
        """Applies dropout to [B, …].

        Raises:
            ModelError: no samples are set, or their number differs from the rows.
        """
        if not self.training or not self.p:
            return x
        return _dropped(x, self.p, self.name, self._key, self.shard)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Running:
    """A hook that records a running forward pass, for dropout that a module calls as a function.

    Args:
        name: name of the module in the whole model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = _key_of(f"{name}()")
        self.shard: Shard | None = None
        """Part of the attention heads that the module has, if ranks share the heads."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if _current is not None:
            _current.running.append(self)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called after the forward pass, including after an error."""
        if _current is not None and _current.running:
            _current.running.pop()


def replace_dropout(net: nn.Module) -> list[str]:
    """Replaces every `nn.Dropout` by `SampleDropout`, and adds a `Running` hook to third-party modules.

    Returns:
        Names of remaining layers that draw random numbers in another way (such as `nn.Dropout2d`): they are seeded by
        rank, so that a run is reproducible only on the same layout.
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
        elif not type(module).__module__.startswith(("torch.", "maas_ray.")) or isinstance(module, nn.MultiheadAttention):  # fmt: skip
            running = Running(name)
            module.register_forward_pre_hook(running)
            module.register_forward_hook(running.end, always_call=True)
            module.__dict__["_maas_running"] = running
    return left


def running_of(module: nn.Module) -> Running | None:
    """The `Running` hook of a module, or None."""
    found: Running | None = module.__dict__.get("_maas_running")
    return found


def _call_ours(is_ours: bool) -> None:
    functional.dropout = _dropout if is_ours else _TORCH["dropout"]
    functional.scaled_dot_product_attention = _attention if is_ours else _TORCH["scaled_dot_product_attention"]  # type: ignore[assignment]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Replaces torch.nn.functional.dropout: modules with a `Running` hook get a mask of the samples. Never in place."""
    if not training or not p or _current is None or not _current.running:
        drawn: Tensor = _TORCH["dropout"](input, p, training, inplace)
        return drawn
    running = _current.running[-1]
    if running.shard is not None and input.dim() != 4:
        raise ModelError(
            f"parallelism.tp: {running.name} calls dropout on values of shape {list(input.shape)}, of which a rank may "
            "have a part or all; set this dropout to 0, make it an nn.Dropout, or use dp_shard instead of tp"
        )
    return _dropped(input, p, running.name, running.key, running.shard)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Replaces torch.nn.functional.scaled_dot_product_attention: with dropout, computes the steps of its documentation.

    torch's kernels draw the mask internally; here the attention weights [..., T, T] exist, which costs their memory.
    """
    if not dropout_p or _current is None or not _current.running:
        fused: Tensor = _TORCH["scaled_dot_product_attention"](
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )  # fmt: skip
        return fused
    if enable_gqa:
        key, value = (heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3) for heads in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        attn_mask = seen if attn_mask is None else attn_mask & seen
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _dropout(scores.softmax(-1), dropout_p) @ value


def _dropped(x: Tensor, p: float, name: str, key: int, shard: Shard | None) -> Tensor:
    if isinstance(x, DTensor):
        local = _dropped(x.to_local(), p, name, key, shard)
        return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False)
    num_rows = 0 if _current is None else len(_current.keys)
    if _current is None or not x.dim() or (len(x) != num_rows and (not num_rows or len(x) % num_rows)):
        raise ModelError(
            f"the dropout {name} got {len(x) if x.dim() else 'no'} rows for {num_rows or 'no'} samples; its first "
            "dimension must be the batch"
        )
    if len(x) != num_rows:  # several rows per sample, such as heads or tokens
        parts = x.reshape(num_rows, len(x) // num_rows, *x.shape[1:])
        inner = shard if shard is None or shard[0] < 0 else (shard[0] + 1, *shard[1:])
        return _dropped(parts, p, name, key, inner).reshape(x.shape)
    call = _current.num_calls.get(key, 0)
    _current.num_calls[key] = call + 1
    rows = mix_bits(_current.keys.to(x.device) + (key + 0x9E3779B9 * call))
    bits = mix_bits(rows.reshape(-1, *[1] * (x.dim() - 1)) + _elements(x, shard)) & ((1 << _BITS) - 1)
    kept = bits >= round(p * (1 << _BITS))
    return x * kept.to(x.dtype) / (1 - p) if p < 1 else x * 0.0


def _elements(x: Tensor, shard: Shard | None) -> Tensor:
    """int64 [1, …]: the index of each element in its row of the whole activation, times SplitMix64's step."""
    places = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim in range(1, x.dim()):
        size, start = x.shape[dim], 0
        if shard is not None and shard[0] % x.dim() == dim:
            _, index, count = shard
            size, start = size * count, size * index
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        here = torch.arange(start, start + x.shape[dim], device=x.device).reshape(shape)
        places = places * size + here
    return places * _STEP


def _key_of(name: str) -> int:
    return int.from_bytes(sha256(name.encode()).digest()[:8], "little", signed=True)


def mix_bits(z: Tensor) -> Tensor:
    """Same as `maas_ray.data.loading.order.mix` with the key 0, on int64."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _M1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _M2
    return z ^ ((z >> 31) & ((1 << 33) - 1))
