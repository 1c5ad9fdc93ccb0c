"""Pipeline stages of any module: each stage is the whole module, with holes instead of the layers of other stages.

A stage runs the module's own forward pass on the rows, which every rank of a pipeline has. Holes before the stage
return NaN; the inputs of the stage's first layer are replaced by the results of the previous stage; and the pass ends
at the first layer of the next stage. So masks, positions and other values that depend only on the rows are computed
where they are used, names remain those of the whole module, and layers remain modules that can be sharded. (The graphs
of torch's tracer, `torch.distributed.pipelining.pipeline`, have no such layers, and only one batch size.)

This works if the first layer of a stage receives all earlier results that it and later layers need. A check determines
this without computation: the module runs on tensors without data (torch's FakeTensorMode), and autograd shows the
dependencies of each stage's result.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from maas_ray.errors import ModelError

_ROWS = (2, 3)
"""Numbers of rows with which a module is analyzed: sizes that differ grow with them."""


@dataclass
class Unit:
    """A layer that belongs to one stage completely.

    Attributes:
        name: name in the module.
        size: number of its weights.
        num_calls: number of calls in the analyzed forward passes.
        crossing: indices of its flattened inputs that depend on weights: the inputs of a stage that starts here.
        results: its flattened results for each number of rows in `_ROWS`; tensors are (shape, dtype).
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


def find_units(net: nn.Module, named: Sequence[str] = ()) -> list[str]:
    """Names of the layers with weights between which a module can be split: members of its outermost lists, and the
    modules next to such a list.

    Args:
        net: any module.
        named: layers that must be units, even inside of others.
    """
    found: list[str] = []

    def visit(name: str, module: nn.Module, is_listed: bool, is_open: bool) -> None:
        has_named = any(other.startswith(f"{name}." if name else "") for other in named)
        has_list = not is_listed and any(_is_list(below) for below in module.modules())
        children = [(key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]
        if has_named or ((is_open or has_list) and children and name not in named):
            for key, child in children:
                whole = f"{name}.{key}" if name else key
                visit(whole, child, _is_list(module), is_open and len(children) == 1 and not _is_list(module))
        elif name and any(True for _ in module.parameters()):
            found.append(name)

    visit("", net, False, True)
    return found


def stage_modules(
    net: nn.Module, example: Tensor, device: torch.device, choose: Callable[[list[Unit]], list[int]], named: Sequence[str] = ()
) -> list[nn.Module]:  # fmt: skip
    """Splits a module into stages that share its weights.

    Args:
        net: any module from rows to one tensor; its weights need no data.
        example: input rows, [any number, …].
        device: device of the stages.
        choose: maps the units, in the order of their calls, to the first unit of each stage but the first.
        named: layers that must be units.

    Raises:
        ModelError: the module cannot be split this way; the message contains the reason.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # late: a sequence of layers does not need it

    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        blank = _blank(net, fake)
        with fake:
            units = _observe(blank, find_units(net, named), [_rows_like(example, count) for count in _ROWS])
            cuts = [0, *choose(units), len(units)]
            owners = _owners_of_others(blank, units, cuts, _rows_like(example, _ROWS[0]))
    except ModelError:
        raise
    except Exception as error:  # the module's code can raise anything on tensors without data
        raise ModelError(
            f"parallelism.pp: {type(net).__name__} cannot be split into pipeline stages: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; use another layout, or make it a torch.nn.Sequential of named "
            "layers, each with one input and one output tensor"
        ) from error
    return [
        _stage(net, units, span, {name for name, owner in owners.items() if owner == number}, device)
        for number, span in enumerate(pairwise(cuts))
    ]


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
        sizes = [a + (b - a) * (self.flow.num_rows - _ROWS[0]) for a, b in zip(shape, larger, strict=True)]
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


def _is_list(module: nn.Module) -> bool:
    is_sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    with_weights = sum(any(True for _ in child.parameters()) for child in module.children())
    return (is_sequence or isinstance(module, nn.ModuleList)) and with_weights > 1


def _rows_like(example: Tensor, count: int) -> Tensor:
    return torch.zeros(count, *example.shape[1:], dtype=example.dtype)


def _blank(net: nn.Module, fake: Any) -> nn.Module:
    """A copy without data."""
    memo: dict[int, Any] = {}
    with fake:
        for weight in net.parameters():
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.is_floating_point())
        for buffer in net.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return deepcopy(net, memo).eval()


def _observe(net: nn.Module, names: Sequence[str], examples: Sequence[Tensor]) -> list[Unit]:
    """Runs a module and returns its units in the order of their calls."""
    units: list[Unit] = []
    handles: list[Any] = []
    for name in names:
        module = net.get_submodule(name)
        seen = _Seen(Unit(name, sum(weight.numel() for weight in module.parameters())), units)
        handles.append(module.register_forward_pre_hook(seen.before, with_kwargs=True))
        handles.append(module.register_forward_hook(seen.after))
    for example in examples:
        net(example)
    for handle in handles:
        handle.remove()
    for unit in units:
        if unit.num_calls != len(examples):
            raise ModelError(
                f"parallelism.pp: {unit.name} is called {unit.num_calls // len(examples)} times in a forward pass, but "
                "a pipeline runs each layer once; use another layout"
            )
    if missing := sorted(set(names) - {unit.name for unit in units}):
        raise ModelError(
            f"parallelism.pp: {missing[0]} is not called in the forward pass and belongs to no stage; use another "
            "layout"
        )
    return units


class _Seen:
    def __init__(self, unit: Unit, order: list[Unit]) -> None:
        self.unit, self.order = unit, order

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        values = tree_flatten((args, kwargs))[0]
        self.unit.crossing = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        if not self.unit.num_calls:
            self.order.append(self.unit)
        self.unit.num_calls += 1

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        values, self.unit.form = tree_flatten(result)
        self.unit.results.append([(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in values])


def _owners_of_others(net: nn.Module, units: list[Unit], cuts: Sequence[int], rows: Tensor) -> dict[str, int]:
    """The stage of each weight that is in no unit. Refuses a module that cannot be split this way."""
    inside = tuple(f"{unit.name}." for unit in units)
    others = {name: weight for name, weight in net.named_parameters() if not name.startswith(inside)}
    owners: dict[str, int] = {}
    handed: tuple[Tensor, ...] = ()
    for number, (start, stop) in enumerate(pairwise(cuts)):
        traced: list[Tensor] = []
        stage = _stage(net, units, (start, stop), set(others), torch.device("cpu"), traced)
        handed = tuple(value.detach().requires_grad_() for value in handed)
        result = stage(*handed, rows=rows) if number else stage(rows)
        handed = result if isinstance(result, tuple) else (result,)
        depends = _dependence(handed, [*traced, *others.values()])
        if any(depends[: len(traced)]):
            raise ModelError(
                f"parallelism.pp: {units[start].name} does not receive all earlier results that it and later layers "
                "need; start the stage at another layer (parallelism.pp_split), or use another layout"
            )
        for name in [name for name, is_used in zip(others, depends[len(traced) :], strict=True) if is_used]:
            if owners.setdefault(name, number) != number:
                raise ModelError(
                    f"parallelism.pp: the weight {name} is used in the stages {owners[name]} and {number}; start the "
                    "stages at other layers (parallelism.pp_split), or use another layout"
                )
    return {name: owners.get(name, 0) for name in others}


def _dependence(results: Sequence[Tensor], sources: Sequence[Tensor]) -> list[bool]:
    """Whether the results depend on each of the sources."""
    roots = [result for result in results if result.requires_grad]
    if not roots or not sources:
        return [False] * len(sources)
    found = torch.autograd.grad(roots, sources, [torch.ones_like(root) for root in roots], allow_unused=True)
    return [gradient is not None for gradient in found]


def _stage(
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
