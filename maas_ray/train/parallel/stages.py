"""Splits any module into pipeline stages (staged_module.py), after an analysis of one forward pass.

This works if the first layer of a stage receives all earlier results that it and later layers need. A check determines
this without computation: the module runs on tensors without data (torch's FakeTensorMode), and autograd shows the
dependencies of each stage's result.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from maas_ray.errors import ModelError
from maas_ray.train.parallel.staged_module import ANALYZED_ROWS, Unit, build_stage


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
            units = _observe(blank, find_units(net, named), [_rows_like(example, count) for count in ANALYZED_ROWS])
            cuts = [0, *choose(units), len(units)]
            owners = _owners_of_others(blank, units, cuts, _rows_like(example, ANALYZED_ROWS[0]))
    except ModelError:
        raise
    except Exception as error:  # the module's code can raise anything on tensors without data
        raise ModelError(
            f"parallelism.pp: {type(net).__name__} cannot be split into pipeline stages: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; use another layout, or make it a torch.nn.Sequential of named "
            "layers, each with one input and one output tensor"
        ) from error
    return [
        build_stage(net, units, span, {name for name, owner in owners.items() if owner == number}, device)
        for number, span in enumerate(pairwise(cuts))
    ]


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
        stage = build_stage(net, units, (start, stop), set(others), torch.device("cpu"), traced)
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
