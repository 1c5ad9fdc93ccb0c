"""Records operations on tensors without data and replays them on real tensors. Independent of modules and ranks.

Detects what cannot be recorded: control flow that depends on values, changes of random generators, and data from
outside of torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_OVERWRITES = {
    "copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_",
    "geometric_",
}  # fmt: skip
"""Operations that completely overwrite a tensor, if they are applied to all of it."""
_EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
"""Operations that only allocate memory; replay allocates it at the first write."""
_MAX_KEPT = 2**20
"""Largest size in bytes of external data (Python numbers, numpy, a file) that is kept with the record."""


class CannotDefer(Exception):
    """The module must be built directly; contains the reason."""


@dataclass(frozen=True)
class Ref:
    """A reference to a tensor by the storage of its data."""

    key: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    num_bytes: int
    """Size of the whole storage."""

    def real(self, place: Any) -> Tensor:
        """The tensor in a real storage, an `UntypedStorage`."""
        return torch.empty(0, dtype=self.dtype).set_(place, self.offset, self.shape, self.stride)


@dataclass
class Step:
    """One operation, with references instead of tensors in its flattened arguments."""

    function: Any
    leaves: list[Any]
    form: Any
    results: list[Ref]
    reads: set[int]
    writes: set[int]
    overwrites: set[int]
    is_draw: bool

    def run(self, places: dict[int, Any]) -> None:
        """Runs the operation on existing storages; adds those that it creates or writes first."""
        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, Ref):
                if leaf.key not in places:
                    places[leaf.key] = torch.UntypedStorage(leaf.num_bytes)  # type: ignore[no-untyped-call]
                leaves.append(leaf.real(places[leaf.key]))
            else:
                leaves.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
        given = set(places)
        args, kwargs = tree_unflatten(leaves, self.form)
        with torch.no_grad():
            results = _tensors(self.function(*args, **kwargs))
            for ref, value in zip(self.results, results, strict=True):
                if ref.key in given:
                    continue
                if (value.stride(), value.storage_offset()) == (ref.stride, ref.offset):
                    places[ref.key] = value.untyped_storage()
                else:  # torch predicted another memory layout
                    places[ref.key] = torch.UntypedStorage(ref.num_bytes)  # type: ignore[no-untyped-call]
                    ref.real(places[ref.key]).copy_(value)


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records every operation that creates or changes a tensor.

    Attributes:
        steps: the recorded operations.
        reason: why a replay is impossible, or empty; the recorded code may have caught the exception.

    Raises:
        CannotDefer: an operation cannot be recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.reason = ""
        self._lent: list[tuple[Tensor, Tensor]] = []  # external data, and its copy at the time of use
        self._made: dict[int, Any] = {}  # all storages, kept so that no address is reused
        self._state = torch.get_rng_state()

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Enables operations that torch rejects without data: `.to(dtype)`, which must keep each weight's object as it
        does with data, and `trunc_normal_`, which draws until its result is in range.
        """

        def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            for child in module.children() if recurse else ():
                child._apply(change)  # type: ignore[no-untyped-call]
            for weight in [weight for weight in module._parameters.values() if weight is not None]:
                with torch.no_grad():
                    weight.data = change(weight)
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer if buffer is None else change(buffer)
            return module

        def draw(tensor: Tensor, *given: Any, **named: Any) -> Tensor:
            if not isinstance(tensor, FakeTensor):
                return truncated(tensor, *given, **named)
            self._state_is_ours()
            leaves, form = tree_flatten(((tensor, *given), named))
            key = {key_of(tensor)}
            overwritten = key if _is_all(tensor) else set()
            kept = [self._kept(leaf) for leaf in leaves]
            self.steps.append(Step(truncated, kept, form, [ref_of(tensor)], key - overwritten, key, overwritten, True))
            return tensor

        apply, truncated = nn.Module._apply, nn.init._no_grad_trunc_normal_
        nn.Module._apply = convert  # type: ignore[method-assign]
        nn.init._no_grad_trunc_normal_ = draw
        try:
            yield
            self._state_is_ours()
            with no_dispatch():
                if not all(((data == then) | ((data != data) & (then != then))).all() for data, then in self._lent):
                    self._refuse("it uses external data (numpy) that changes during the build")
        finally:
            nn.Module._apply = apply  # type: ignore[method-assign]
            nn.init._no_grad_trunc_normal_ = truncated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._number(func, args[0])
        leaves, form = tree_flatten((args, kwargs))
        kept = [self._kept(leaf) for leaf in leaves]  # in their state before the call
        is_draw = torch.Tag.nondeterministic_seeded in func.tags
        if is_draw:
            self._state_is_ours()
        result = func(*args, **kwargs)
        results = _tensors(result)
        sources, changed = self._roles(func, args, kwargs)
        made = {key_of(value) for value in results} - {leaf.key for leaf in kept if isinstance(leaf, Ref)}
        self._made |= {key_of(value): value.untyped_storage() for value in (*results, *changed)}
        name = func._schema.name.removeprefix("aten::")
        if name in _EMPTY or not (made or changed):
            return result
        if name == "set_":
            self._refuse("it moves a tensor to another storage")
        for value in results:
            if value.device.type != "cpu":
                self._refuse(f"it creates tensors on {value.device}")
        reads, writes = ({key_of(value) for value in values} for values in (sources, changed))
        overwritten = {key_of(value) for value in changed if name in _OVERWRITES and _is_all(value)} - reads
        self.steps.append(
            Step(
                func,
                kept,
                form,
                [ref_of(value) for value in results],
                reads=reads | (writes - overwritten),
                writes=made | writes,
                overwrites=made | overwritten,
                is_draw=is_draw,
            )
        )
        return result

    def _roles(self, func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors without data that an operation reads, and those that it changes."""
        sources: list[Tensor] = []
        changed: list[Tensor] = []
        schema = func._schema.arguments
        named = [(each, kwargs[each.name]) for each in schema if each.name in kwargs]
        for argument, value in (*zip(schema, args, strict=False), *named):
            alias = argument.alias_info
            tensors = _tensors(value)
            blank = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
            if len(blank) < len(tensors) and alias is not None and func is not torch.ops.aten.lift_fresh.default:
                self._refuse(f"it changes external data (numpy, a file) in place, by {func}")
            (changed if alias is not None and alias.is_write else sources).extend(blank)
        return sources, changed

    def _kept(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            self._refuse("it uses its own random generator")
        if not isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, FakeTensor):
            if key_of(leaf) not in self._made:
                self._refuse("it sets a tensor to external data (numpy, a file)")
            return ref_of(leaf)
        with no_dispatch():
            self._lent.append((leaf.detach(), leaf.detach().clone()))
        if sum(data.numel() * data.element_size() for data, _ in self._lent) > _MAX_KEPT:
            self._refuse(f"it uses more than {_MAX_KEPT >> 20} MiB of external data (numpy, a file)")
        return self._lent[-1][1]

    def _number(self, func: Any, tensor: Tensor) -> Any:
        """The result of `.item()`, if it does not depend on random numbers, such as a dropout rate for each layer."""
        ref = ref_of(tensor)
        needed = [
            step for step, is_needed in zip(self.steps, needed_steps(self.steps, {ref.key}), strict=True) if is_needed
        ]
        if ref.key not in {key for step in needed for key in step.writes} or any(step.is_draw for step in needed):
            return func(tensor)
        places: dict[int, Any] = {}
        with no_dispatch():
            for step in needed:
                step.run(places)
            return ref.real(places[ref.key]).item()

    def _state_is_ours(self) -> None:
        """Refuses code that changes the state of torch's generator between two draws."""
        with no_dispatch():
            if not torch.equal(torch.get_rng_state(), self._state):
                self._refuse("it sets torch's random generator")
            torch.rand(())  # so that a return to an earlier state is detected
            self._state = torch.get_rng_state()

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason
        raise CannotDefer(reason)


def needed_steps(steps: Sequence[Step], wanted: set[int]) -> list[bool]:
    """Whether the wanted storages, or the number of draws, depend on each step."""
    is_needed, alive = [False] * len(steps), set(wanted)
    for n in reversed(range(len(steps))):
        step = steps[n]
        is_needed[n] = bool(alive & step.writes) or (step.is_draw and bool(step.reads))
        if is_needed[n]:
            alive = (alive - step.overwrites) | step.reads
    return is_needed


def early_order(steps: Sequence[Step], is_needed: Sequence[bool]) -> list[int]:
    """The order of the needed steps and all draws: tensor by tensor, as far as the draws allow.

    Draws keep their order; other steps run once the steps that depend on them can complete too. Therefore a tensor
    that is changed long after its draw, when all others have been drawn, does not wait for them.
    """
    before: dict[int, list[int]] = {}
    draws: dict[int, int] = {}  # the last draw that a step depends on
    written: dict[int, int] = {}
    read: dict[int, list[int]] = {}
    for n, step in enumerate(steps):
        if is_needed[n]:
            before[n] = [written[key] for key in step.reads | step.writes if key in written]
            before[n] += [other for key in step.writes for other in read.pop(key, ())]
            draws[n] = n if step.is_draw else max((draws[other] for other in before[n]), default=-1)
            written |= dict.fromkeys(step.writes, n)
            for key in step.reads - step.writes:
                read.setdefault(key, []).append(n)
        elif step.is_draw:
            before[n], draws[n] = [], n
    inner = {other for others in before.values() for other in others}
    order: dict[int, None] = {}
    for _, last in sorted((draws[n], n) for n in before if steps[n].is_draw or n not in inner):
        waiting, found = [last], set()
        while waiting:
            n = waiting.pop()
            if n not in order and n not in found:
                found.add(n)
                waiting += before[n]
        order |= dict.fromkeys(sorted(found))
    return list(order)


def key_of(tensor: Tensor) -> int:
    """The storage of a tensor's data, which its views share."""
    key: int = tensor.untyped_storage()._cdata
    return key


def ref_of(tensor: Tensor) -> Ref:
    """A reference to a tensor."""
    num_bytes = tensor.untyped_storage().nbytes()
    offset = int(tensor.storage_offset())
    return Ref(key_of(tensor), tuple(tensor.shape), tensor.stride(), offset, tensor.dtype, num_bytes)


def _is_all(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
