"""A pipeline stage of any module: the whole module, with holes instead of the layers of other stages.

A stage runs the module's own forward pass on the rows, which every rank of a pipeline has. Holes before the stage
return NaN; the inputs of the stage's first layer are replaced by the results of the previous stage; and the pass ends
at the first layer of the next stage. So masks, positions and other values that depend only on the rows are computed
where they are used, names remain those of the whole module, and layers remain modules that can be sharded. (The graphs
of torch's tracer, `torch.distributed.pipelining.pipeline`, have no such layers, and only one batch size.)
"""

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from maas_ray.errors import ModelError

ANALYZED_ROWS = (2, 3)
"""Numbers of rows with which a module is analyzed: sizes that differ grow with them."""


@dataclass
class Unit:
    """A layer that belongs to one stage completely.

    Attributes:
        name: name in the module.
        size: number of its weights.
        num_calls: number of calls in the analyzed forward passes.
        crossing: indices of its flattened inputs that depend on weights: the inputs of a stage that starts here.
        results: its flattened results for each number of rows in `ANALYZED_ROWS`; tensors are (shape, dtype).
        form: tree structure of its result.
    """

    name: str
    size: int
    num_calls: int = 0
    crossing: list[int] = field(default_factory=list)
    results: list[list[Any]] = field(default_factory=list)
    form: Any = None


class StagedModule(nn.Module):
    """Base class that is added to the class of a module when it becomes a stage."""

    def forward(self, *received: Tensor, rows: Tensor | None = None) -> Any:
        """Computes the inputs of the next stage from the rows (first stage), or from the previous results and the rows.

        The last stage returns the result of the module.
        """
        flow: _Flow = self.__dict__["_flow"]
        if flow.is_first:
            rows, received = received[0], ()
        if rows is None:
            raise ModelError("a pipeline stage was called without the rows")
        flow.received, flow.num_rows = received, len(rows)
        try:
            return super().forward(rows)
        except _StageEnded as ended:
            return ended.values[0] if len(ended.values) == 1 else ended.values
        finally:
            flow.received = ()


def build_stage(
    net: nn.Module, units: list[Unit], span: tuple[int, int], others: set[str], device: torch.device, traced: list[Tensor] | None = None
) -> nn.Module:  # fmt: skip
    """The module with the units [start, stop) and the given other weights, and holes for the rest."""
    start, stop = span
    flow = _Flow(start == 0, traced)
    own = units[start:stop]
    memo: dict[int, Any] = {id(buffer): buffer for buffer in net.buffers()}
    for number, unit in enumerate(units):
        module = net.get_submodule(unit.name)
        if start <= number < stop:
            memo[id(module)] = module  # shared, not copied
            continue
        own_hooks = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks)
        replaced: dict[int, Any] = {id(hooks): OrderedDict() for hooks in own_hooks}
        nothings = {id(tensor): _nothing(tensor, device, traced) for tensor in _tensors(module)}
        hole = deepcopy(module, replaced | nothings)
        _forget(hole, nothings)
        hole.__dict__["forward"] = _End(unit) if number == stop else _Hole(unit, flow, device)
        memo[id(module)] = hole
    inside = tuple(f"{unit.name}." for unit in units)
    outside = {name: weight for name, weight in net.named_parameters() if not name.startswith(inside)}
    nothings = {id(weight): _nothing(weight, device, traced) for name, weight in outside.items() if name not in others}
    memo |= {id(weight): weight for name, weight in outside.items() if name in others} | nothings
    stage: nn.Module = deepcopy(net, memo)
    if start:
        stage.get_submodule(own[0].name).register_forward_pre_hook(_Begin(own[0], flow), with_kwargs=True)
    _forget(stage, nothings)
    if start:  # the first stage saves buffers that belong to no layer
        for name, module in stage.named_modules():
            if not f"{name}.".startswith(tuple(f"{unit.name}." for unit in own)):
                module._non_persistent_buffers_set = {*module._buffers}
    stage.__dict__["_flow"] = flow
    kind = type(stage)
    stage.__class__ = type(f"{kind.__name__}Stage", (StagedModule, kind), {})
    return stage


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _nothing(tensor: Tensor, device: torch.device, traced: list[Tensor] | None) -> Tensor:
    """A tensor of the same shape that needs no memory and makes every result NaN."""
    if not tensor.is_floating_point():
        return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
    nothing = torch.full((), torch.nan, dtype=tensor.dtype, device=device)
    if traced is not None:
        traced.append(nothing.requires_grad_())
    return nothing.expand(tensor.shape)


def _forget(net: nn.Module, nothings: Mapping[int, Tensor]) -> None:
    """Converts the placeholders of weights to plain attributes, so that they are neither state nor trained."""
    forgotten = {id(tensor) for tensor in nothings.values()}
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for key, value in list(tensors.items()):
                if id(value) in forgotten:
                    del tensors[key]
                    module.__dict__[key] = value


class _StageEnded(BaseException):  # no error: ends a forward pass, even if the module's code catches errors
    def __init__(self, values: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.values = values


class _Flow:
    """The data of one forward pass through a stage."""

    def __init__(self, is_first: bool, traced: list[Tensor] | None) -> None:
        self.is_first = is_first
        self.received: tuple[Tensor, ...] = ()
        self.num_rows = 0
        self.traced = traced
        """Collects the results of holes if autograd must determine what depends on them."""


class _Hole:
    """Replaces the forward pass of a layer in stages after its own."""

    def __init__(self, unit: Unit, flow: _Flow, device: torch.device) -> None:
        self.unit, self.flow, self.device = unit, flow, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tree_unflatten([self._leaf(*both) for both in zip(*self.unit.results, strict=True)], self.unit.form)

    def _leaf(self, few: Any, more: Any) -> Any:
        if not isinstance(few, tuple):
            return few
        (shape, dtype), (larger, _) = few, more
        # The sizes for 2 and 3 rows determine the size for N rows: k * N + c.
        sizes = [a + (b - a) * (self.flow.num_rows - ANALYZED_ROWS[0]) for a, b in zip(shape, larger, strict=True)]
        if not dtype.is_floating_point:
            if self.flow.traced is not None:
                raise ModelError(
                    f"parallelism.pp: {self.unit.name} returns {dtype}, which layers of a later stage may need; start "
                    "the stages at other layers (parallelism.pp_split), or use another layout"
                )
            return torch.zeros(sizes, dtype=dtype, device=self.device)
        nothing = torch.full(sizes, torch.nan, dtype=dtype, device=self.device)
        if self.flow.traced is None:
            return nothing
        self.flow.traced.append(nothing.requires_grad_())
        return nothing.clone()


class _End:
    """Replaces the forward pass of the first layer of the next stage."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = tree_flatten((args, kwargs))[0]
        raise _StageEnded(tuple(values[i].contiguous() for i in self.unit.crossing))


class _Begin:
    """A hook of a stage's first layer that replaces its inputs by the results of the previous stage."""

    def __init__(self, unit: Unit, flow: _Flow) -> None:
        self.unit, self.flow = unit, flow

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.flow.received:
            return None  # the whole module runs, which also contains this layer
        values, form = tree_flatten((args, kwargs))
        for i, value in zip(self.unit.crossing, self.flow.received, strict=True):
            values[i] = value
        return tree_unflatten(values, form)
