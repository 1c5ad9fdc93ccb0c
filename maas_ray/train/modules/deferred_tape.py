"""What is done to tensors without data, written down, and later done to real ones. Knows no module's names and no ranks.

What cannot be written down is noticed: values that decide what is done next, random generators that are set on the way,
and data that does not come from torch.
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
"""Operations after which nothing is left of what a tensor was, if they are given all of it."""
_EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
"""Operations that only take memory, which is taken when something is written to it."""
_MAX_KEPT = 2**20
"""Bytes of data from elsewhere (Python's numbers, numpy, a file) that are kept with what is written down."""


class CannotDefer(Exception):
    """The module has to be built at once, with the reason."""


@dataclass(frozen=True)
class Ref:
    """A tensor by the place where its data would be."""

    key: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    num_bytes: int
    """Of the whole place."""

    def real(self, place: Any) -> Tensor:
        """The tensor, where the place is an `UntypedStorage`."""
        return torch.empty(0, dtype=self.dtype).set_(place, self.offset, self.shape, self.stride)


@dataclass
class Step:
    """One operation: in its arguments, flattened, references stand for tensors."""

    function: Any
    leaves: list[Any]
    form: Any
    results: list[Ref]
    reads: set[int]
    writes: set[int]
    overwrites: set[int]
    is_draw: bool

    def run(self, places: dict[int, Any]) -> None:
        """Does it, on the places that there are; what it makes, or is the first to write to, is added to them."""
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
                else:  # torch said another order in memory
                    places[ref.key] = torch.UntypedStorage(ref.num_bytes)  # type: ignore[no-untyped-call]
                    ref.real(places[ref.key]).copy_(value)


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, all that makes or changes a tensor is written down; what only looks at one has no effect.

    Attributes:
        steps: what was done.
        reason: why it cannot be done again, if so; code that was run may have caught the exception.

    Raises:
        CannotDefer: inside it, at what cannot be written down.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.reason = ""
        self._lent: list[tuple[Tensor, Tensor]] = []  # data from elsewhere, and what it was when it was looked at
        self._made: dict[int, Any] = {}  # all places, kept so that no address is used twice
        self._state = torch.get_rng_state()

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Lets torch do without data what it would refuse: `.to(dtype)`, which keeps each weight's object as it does with
        data, and `trunc_normal_`, which draws until it likes what it has drawn.
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
                    self._refuse("it takes data from elsewhere (numpy) that changes while it is built")
        finally:
            nn.Module._apply = apply  # type: ignore[method-assign]
            nn.init._no_grad_trunc_normal_ = truncated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._number(func, args[0])
        leaves, form = tree_flatten((args, kwargs))
        kept = [self._kept(leaf) for leaf in leaves]  # as they are before the call
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
            self._refuse("it moves a tensor to another place in memory")
        for value in results:
            if value.device.type != "cpu":
                self._refuse(f"it makes tensors on {value.device}")
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
        """The tensors without data that an operation is given to look at, and those to change."""
        sources: list[Tensor] = []
        changed: list[Tensor] = []
        schema = func._schema.arguments
        named = [(each, kwargs[each.name]) for each in schema if each.name in kwargs]
        for argument, value in (*zip(schema, args, strict=False), *named):
            alias = argument.alias_info
            tensors = _tensors(value)
            blank = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
            if len(blank) < len(tensors) and alias is not None and func is not torch.ops.aten.lift_fresh.default:
                self._refuse(f"it uses data from elsewhere (numpy, a file) in place, by {func}")
            (changed if alias is not None and alias.is_write else sources).extend(blank)
        return sources, changed

    def _kept(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            self._refuse("it draws from a generator of its own")
        if not isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, FakeTensor):
            if key_of(leaf) not in self._made:
                self._refuse("it gives a tensor data from elsewhere (numpy, a file)")
            return ref_of(leaf)
        with no_dispatch():
            self._lent.append((leaf.detach(), leaf.detach().clone()))
        if sum(data.numel() * data.element_size() for data, _ in self._lent) > _MAX_KEPT:
            self._refuse(f"it takes more than {_MAX_KEPT >> 20} MiB of data from elsewhere (numpy, a file)")
        return self._lent[-1][1]

    def _number(self, func: Any, tensor: Tensor) -> Any:
        """What `.item()` gives, if it does not depend on a draw, such as a rate of dropout for each layer."""
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
        """Refuses code that sets torch's generator: between two draws it has to stay as it was left here."""
        with no_dispatch():
            if not torch.equal(torch.get_rng_state(), self._state):
                self._refuse("it sets torch's random generator")
            torch.rand(())  # so that going back to any earlier state is noticed
            self._state = torch.get_rng_state()

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason
        raise CannotDefer(reason)


def needed_steps(steps: Sequence[Step], wanted: set[int]) -> list[bool]:
    """On which steps these places depend, or how much is drawn."""
    is_needed, alive = [False] * len(steps), set(wanted)
    for n in reversed(range(len(steps))):
        step = steps[n]
        is_needed[n] = bool(alive & step.writes) or (step.is_draw and bool(step.reads))
        if is_needed[n]:
            alive = (alive - step.overwrites) | step.reads
    return is_needed


def early_order(steps: Sequence[Step], is_needed: Sequence[bool]) -> list[int]:
    """In which order to do the needed steps and all draws: tensor by tensor, as far as the draws let it be.

    Draws stay in their order; all else is done when what follows from it can be finished too. So a tensor that is changed
    long after it was drawn, when all others have been drawn, does not wait for them.
    """
    before: dict[int, list[int]] = {}
    draws: dict[int, int] = {}  # the last draw that a step waits for
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
    """The place of a tensor's data, which its views share."""
    key: int = tensor.untyped_storage()._cdata
    return key


def ref_of(tensor: Tensor) -> Ref:
    """Where a tensor's data would be."""
    num_bytes = tensor.untyped_storage().nbytes()
    offset = int(tensor.storage_offset())
    return Ref(key_of(tensor), tuple(tensor.shape), tensor.stride(), offset, tensor.dtype, num_bytes)


def _is_all(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
