"""Plans which rank writes which tile, with torch's save planner, once per layout. Independent of stores."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from maas_ray.checkpoint.collectives import Collectives
from maas_ray.checkpoint.parts import PartLayout, lay_out
from maas_ray.checkpoint.pieces import TensorPiece, piece_of
from maas_ray.errors import SaveFailed


@dataclass(frozen=True)
class SaveAttempt:
    """One attempt to save, agreed by all ranks.

    Attributes:
        step: optimizer steps done.
        name: 32 unique hex digits.
        pieces: this rank's pieces of tensors.
        layouts: the parts that this rank writes; a tile that several ranks have is written by one of them.
        shapes: type and shape of every tensor; on rank 0.
    """

    step: int
    name: str
    pieces: Mapping[str, TensorPiece]
    layouts: tuple[PartLayout, ...]
    shapes: Metadata | None


@dataclass(frozen=True)
class _Hello:
    step: int
    attempt: str
    is_planned: bool
    nbytes: int
    failure: str | None


class Planner:
    """Plans saves of one group of ranks; reuses the plan as long as no rank's tensors change their layout.

    Args:
        collectives: the ranks.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._signature: Any = None
        self._layouts: tuple[PartLayout, ...] = ()
        self._shapes: Metadata | None = None

    def prepare(self, step: int, tensors: Mapping[str, Tensor]) -> SaveAttempt:
        """Agrees on an attempt; every rank calls it with its tensors.

        Raises:
            SaveFailed: on every rank: a rank's tensors cannot be stored, do not fit those of the others, belong to
                another step, or a rank did not respond.
        """
        pieces: dict[str, TensorPiece] = {}
        failure = None
        try:
            found = {name: piece_of(name, tensor) for name, tensor in tensors.items()}
            pieces = {name: piece for name, piece in found.items() if piece is not None}
        except Exception as error:  # such as a Partial placement: the other ranks must receive every error
            failure = f"rank {self._collectives.rank}: {error}"
        signature = [(name, piece.shape, piece.box, piece.local.dtype) for name, piece in pieces.items()]
        nbytes = sum(piece.nbytes for piece in pieces.values())
        hello = _Hello(step, uuid.uuid4().hex, signature == self._signature, nbytes, failure)
        everybody = self._collectives.gather_all(hello)
        refuse(each.failure for each in everybody)
        steps = sorted({each.step for each in everybody})
        if len(steps) > 1:
            raise SaveFailed(f"the ranks save different steps ({', '.join(map(str, steps))}); nothing is committed")
        if not all(each.is_planned for each in everybody):
            self._signature = None
            total = sum(each.nbytes for each in everybody)
            self._plan({name: replace(piece, total_bytes=total) for name, piece in pieces.items()})
            self._signature = signature
        return SaveAttempt(step, everybody[0].attempt, pieces, self._layouts, self._shapes)

    def _plan(self, pieces: dict[str, TensorPiece]) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        mine = SavePlan([])
        failure = None
        try:
            planner.set_up_planner(pieces, None, self._collectives.rank == 0)
            mine = planner.create_local_plan()
        except Exception as error:
            failure = f"rank {self._collectives.rank}, planning: {error}"
        everybody = self._collectives.gather((mine, failure))
        answers: list[tuple[SavePlan, str | None]] = []
        if self._collectives.rank == 0:
            plans = [plan for plan, _ in everybody]
            try:
                refuse(reason for _, reason in everybody)
                _same_tensors(plans)
                plans, self._shapes = planner.create_global_plan(plans)
                answers = [(plan, None) for plan in plans]
            except SaveFailed as error:
                answers = [(plan, str(error)) for plan in plans]
            except Exception as error:  # torch raises a ValueError if tiles overlap or are missing
                answers = [(plan, f"rank 0, planning: {error}") for plan in plans]
        plan, failure = self._collectives.scatter(answers)
        refuse([failure])
        self._layouts = tuple(lay_out(planner.finish_plan(plan).items, self._collectives.rank))


def refuse(failures: Any) -> None:
    """Raises `SaveFailed` with the reasons, if there are any."""
    reasons = [failure for failure in failures if failure is not None]
    if reasons:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise SaveFailed(f"the checkpoint was aborted, nothing is committed: {'; '.join(reasons[:3])}{more}")


def _same_tensors(plans: list[SavePlan]) -> None:
    seen: dict[str, Any] = {}
    for plan in plans:
        for item in plan.items:
            if item.tensor_data is None:
                raise ValueError(f"{item.index.fqn} is not a tensor")
            here = (tuple(item.tensor_data.size), item.tensor_data.properties.dtype)
            if seen.setdefault(item.index.fqn, here) != here:
                raise ValueError(f"the ranks disagree on {item.index.fqn}: {seen[item.index.fqn]} and {here}")
