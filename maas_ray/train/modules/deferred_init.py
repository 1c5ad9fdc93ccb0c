"""Deferred initialization: builds a module without data, and later fills its tensors, bitwise equal to a direct build.

All weights come from one random generator, one after the other, so that every rank must draw all of them, but needs not
keep them. The module is built on tensors without data (torch's FakeTensorMode) while every operation on them is
recorded. After the module is split, the operations are replayed on real tensors, each of which exists from its first
operation to its last: a rank copies its part, and no rank ever holds the whole model. Independent of layouts.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor

from maas_ray.checkpoint.pieces import piece_of
from maas_ray.train.modules.deferred_tape import CannotDefer, Ref, Tape, early_order, needed_steps, ref_of


class Deferred:
    """A module whose tensors have no data (device `meta`), with the recorded operations that fill them.

    Random numbers are drawn on the CPU; parts are copied to the rank's device one by one. Untested on GPUs.

    Args:
        build: builds the module on the CPU; it may seed torch's generator with `seed` first.
        seed: seed of torch's generator at the start.

    Raises:
        CannotDefer: `build` has an operation that cannot be recorded, or fails.
    """

    def __init__(self, build: Callable[[], nn.Module], seed: int) -> None:
        self._seed = seed
        torch.manual_seed(seed)
        mode, tape = FakeTensorMode(allow_non_fake_inputs=True), Tape()
        try:
            with warnings.catch_warnings(), tape.adapted(), mode, tape:
                # copy.deepcopy accesses it and handles the result
                warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
                self.net = build()
        except Exception as error:  # the module's code can raise anything on tensors without data
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CannotDefer(tape.reason or said) from error
        if tape.reason:
            raise CannotDefer(tape.reason)
        self.steps = tape.steps
        """The recorded operations, in their order."""
        self.tensors = _take_data(self.net, {key for step in tape.steps for key in step.writes})
        """References to the tensors of the module, by name."""
        if _left_over(mode):
            gc.collect()  # cyclic garbage
            if left := _left_over(mode):
                shapes = ", ".join(str(list(tensor.shape)) for tensor in left[:3])
                raise CannotDefer(f"it keeps tensors that are neither parameters nor buffers, with the shapes {shapes}")

    def fill(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        """Allocates and fills all tensors of a rank's parts of the module; of a DTensor, the part of this rank.

        Afterwards torch's generator has the same state as after a direct build.
        """
        empty: dict[str, list[Tensor]] = {}
        for part in parts:
            _give_memory(part, device)
            for name, tensor in (*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)):  # fmt: skip
                empty.setdefault(name, []).append(tensor)
        for name, whole in self.play(empty):
            for tensor in empty[name]:
                _fill(name, tensor, whole)

    def play(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Replays the operations; yields each wanted tensor, whole and on the CPU, as soon as it is complete."""
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(self.tensors[name].key, []).append(name)
        torch.manual_seed(self._seed)
        is_needed = needed_steps(self.steps, set(wanted))
        order = early_order(self.steps, is_needed)
        last = {key: n for n in order if is_needed[n] for key in self.steps[n].reads | self.steps[n].writes}
        places: dict[int, Any] = {}
        for n in order:
            step = self.steps[n]
            if not is_needed[n]:
                step.run({})  # unneeded random numbers are drawn and discarded
                continue
            step.run(places)
            for key in [key for key in step.reads | step.writes if last[key] == n]:
                place = places.pop(key)
                for name in wanted.get(key, ()):
                    yield name, self.tensors[name].real(place)


def _take_data(net: nn.Module, made: set[int]) -> dict[str, Ref]:
    """Replaces the tensors of the module by tensors without data; returns references to the original ones by name."""
    slots = [
        (f"{path}.{key}" if path else key, module, key, tensor)
        for path, module in net.named_modules(remove_duplicate=False)
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None
    ]
    found: dict[str, Ref] = {}
    owners: dict[int, Tensor] = {}
    empty: dict[int, Tensor] = {}
    for name, _, _, tensor in slots:
        found[name] = ref = ref_of(tensor)
        if not isinstance(tensor, FakeTensor) or ref.key not in made:
            raise CannotDefer(f"{name} is not created by the module itself with torch")
        if owners.setdefault(ref.key, tensor) is not tensor:
            raise CannotDefer(f"{name} shares its memory with another tensor")
        if id(tensor) not in empty:
            blank = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            is_weight = isinstance(tensor, nn.Parameter)
            empty[id(tensor)] = nn.Parameter(blank, requires_grad=tensor.requires_grad) if is_weight else blank
    for _, module, key, tensor in slots:
        setattr(module, key, empty[id(tensor)])  # the same one for all names of a tied weight
    return found


def _left_over(mode: FakeTensorMode) -> list[Tensor]:
    """The remaining tensors on which a module was built."""
    return [each for each in gc.get_objects() if type(each) is FakeTensor and each.fake_mode is mode]


def _give_memory(part: nn.Module, device: torch.device) -> None:
    future = torch.__future__
    swaps = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(
        True
    )  # otherwise each name of a tied weight would get a separate weight
    try:
        part.to_empty(device=device)
    finally:
        future.set_swap_module_params_on_conversion(swaps)


def _fill(name: str, tensor: Tensor, whole: Tensor) -> None:
    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            tensor.copy_(whole)
        elif (piece := piece_of(name, tensor)) is not None:
            for dim, (start, size) in enumerate(zip(*piece.box, strict=True)):
                whole = whole.narrow(dim, start, size)
            piece.local.copy_(whole)
