"""Dropout that follows samples: as layers, and as the functions that others' modules call."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from maas_ray.data.loading.order import mix
from maas_ray.errors import ModelError
from maas_ray.train.modules.dropout import current, mix_bits, replace_dropout, resumed, running_of, samples

ROWS = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))  # [N, T, width]


class Calls(nn.Module):
    """Two attentions and a dropout that are functions, as transformers' models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Attention()
        self.second = _Attention()

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.second(self.first(x)), p=0.25, training=self.training)


class Function(nn.Module):
    """Calls what it is given."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of torch.nn.functional from inside a module."""
    net = Function()
    replace_dropout(net)
    return net(getattr(functional, name), *args, **kwargs)


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 2, -1).transpose(1, 2)  # [N, heads, T, width / heads]
        mixed = functional.scaled_dot_product_attention(
            heads, heads, heads, dropout_p=0.25 if self.training else 0.0, is_causal=True
        )
        return mixed.transpose(1, 2).reshape(x.shape)


def _net() -> Calls:
    net = Calls()
    replace_dropout(net)
    return net


def _run(net: nn.Module, rows: Tensor, positions: Tensor, seed: int = 1) -> Tensor:
    with samples(seed, positions):
        result: Tensor = net(rows)
    return result


def test_a_function_drops_by_the_sample_and_not_by_the_batch_or_the_generator() -> None:
    net, positions = _net(), torch.arange(6)
    torch.manual_seed(1)
    whole = _run(net, ROWS, positions)
    torch.manual_seed(2)
    pieces = torch.cat([_run(net, ROWS[i : i + 2], positions[i : i + 2]) for i in (0, 2, 4)])
    assert torch.equal(whole, pieces)
    assert not torch.equal(whole, _run(net, ROWS, positions, seed=2))
    assert not torch.equal(whole, _run(net, ROWS, positions + 6))
    with samples(1, positions):
        assert float((_call("dropout", torch.ones(6, 1000), 0.25) == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_each_module_has_a_mask_of_its_own() -> None:
    net = _net()
    with samples(1, torch.arange(6)):
        assert not torch.equal(net.first(ROWS), net.second(ROWS))


def test_a_pass_that_is_computed_again_drops_the_same() -> None:
    net = _net()
    with samples(1, torch.arange(6)):
        now = current()
        first = net.first(ROWS)
    with resumed(now):
        assert torch.equal(net.first(ROWS), first)


def test_without_dropout_attention_is_torchs_own_and_step_by_step_it_is_the_same() -> None:
    query, key = torch.randn(6, 4, 5, 8), torch.randn(6, 2, 5, 8)
    mask = torch.rand(6, 1, 5, 5) > 0.3
    mask[..., 0] = True
    for more in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float().log()}, {"scale": 0.3}):
        expected = functional.scaled_dot_product_attention(query, key, key, enable_gqa=True, **more)
        with samples(1, torch.arange(6)):
            fused = _call("scaled_dot_product_attention", query, key, key, enable_gqa=True, **more)
            steps = _call("scaled_dot_product_attention", query, key, key, enable_gqa=True, dropout_p=1e-9, **more)
        assert torch.equal(expected, fused)
        torch.testing.assert_close(steps, expected)


def test_torchs_functions_are_torchs_again_afterwards() -> None:
    before = functional.dropout, functional.scaled_dot_product_attention
    with pytest.raises(ModelError), samples(1, torch.arange(5)):
        _call("dropout", ROWS)  # six rows of five samples
    assert (functional.dropout, functional.scaled_dot_product_attention) == before


def test_several_values_per_sample_are_dropped_one_by_one() -> None:
    flat = ROWS.reshape(24, 8)  # [N * T, width]
    with samples(1, torch.arange(6)):
        whole = _call("dropout", flat)
    with samples(1, torch.arange(3, 6)):
        assert torch.equal(_call("dropout", flat[12:]), whole[12:])


def test_a_slice_of_the_heads_gets_its_slice_of_the_mask_or_is_refused() -> None:
    weights = torch.ones(6, 4, 5, 5)
    net = _net()
    running = running_of(net.first)
    assert running is not None
    with samples(1, torch.arange(6)):
        running(net.first, ())
        whole = functional.dropout(weights)
    running.shard = (1, 1, 2)
    with samples(1, torch.arange(6)):
        running(net.first, ())
        assert torch.equal(functional.dropout(weights[:, 2:]), whole[:, 2:])
        with pytest.raises(ModelError, match=r"parallelism.tp: first calls dropout .* use dp_shard instead of tp"):
            functional.dropout(weights[:, 0])


def test_hashes_of_tensors_are_those_of_arrays() -> None:
    values = np.random.default_rng(0).integers(0, 1 << 64, 1000, np.uint64)
    hashed = mix_bits(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64)
    assert np.array_equal(hashed, mix(values, np.zeros(1, np.uint64)))
