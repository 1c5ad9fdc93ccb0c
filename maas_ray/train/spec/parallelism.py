"""The layout of a run's ranks: the sizes of its device mesh. Independent of torch and of the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from maas_ray.errors import SpecError
from maas_ray.spec import Spec

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Names of the mesh's dimensions, outermost first: adjacent ranks, on one node, form a tensor-parallel group, which
communicates most."""

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True)
class MeshLayout:
    """The sizes of the mesh; their product is the number of ranks."""

    pp: int = 1
    """Pipeline stages (or groups of interleaved stages): each rank has a part of the layers."""
    dp_replicate: int = 1
    """Replicas of the model, or of its shards: each has its own rows."""
    dp_shard: int = 1
    """Ranks that share weights, gradients and optimizer state of a replica as shards (FSDP2); each has its own rows."""
    tp: int = 1
    """Ranks that share each matrix product of the layers in the model's plan."""
    sequence_parallel: bool = False
    """Whether the activations between those layers are split along the sequence over the `tp` ranks."""
    schedule: ScheduleName = "1f1b"
    """Order of the micro-batches in a pipeline."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of the mesh, in the order of `AXES`."""
        return self.pp, self.dp_replicate, self.dp_shard, self.tp

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.tp

    @property
    def dp(self) -> int:
        """Number of ranks with different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def cuts_model(self) -> bool:
        """Whether a rank has only a part of the model."""
        return self.pp > 1 or self.dp_shard > 1 or self.tp > 1

    @property
    def num_stages(self) -> int:
        """Number of parts into which the layers are split."""
        return self.pp * (2 if self.schedule == "interleaved" and self.pp > 1 else 1)

    def __str__(self) -> str:
        if self.world == 1:
            return "one process"
        names = []
        if self.dp_replicate > 1 and self.dp_shard > 1:
            names.append(f"HSDP {self.dp_replicate}x{self.dp_shard}")
        elif self.dp_shard > 1:
            names.append(f"FSDP {self.dp_shard}")
        elif self.dp_replicate > 1:
            names.append(f"DDP {self.dp_replicate}")
        if self.tp > 1:
            names.append(f"TP {self.tp}{' +SP' if self.sequence_parallel else ''}")
        if self.pp > 1:
            names.append(f"PP {self.pp} {self.schedule}")
        return " x ".join(names)


class ParallelismSpec(Spec):
    """How the workers share the model. The product of the four sizes is the number of workers.

    `dp_replicate` or `dp_shard` can be open: it then follows the number of workers. Adjacent ranks form a
    tensor-parallel group; pipeline stages are farthest apart.
    """

    pp: PositiveInt = 1
    """Pipeline stages, with about the same number of weights."""
    pp_split: list[str] | None = None
    """Names of the first layers of the second and each later stage (`interleaved` has twice as many stages); None:
    chosen by size."""
    dp_replicate: PositiveInt | None = None
    """Replicas; None: as many as the workers allow."""
    dp_shard: PositiveInt | None = 1
    """Ranks over which each replica's weights, gradients and optimizer state are sharded (FSDP2); None, with a number
    for `dp_replicate`: over as many as the workers allow."""
    shard_unit_mib: NonNegativeFloat = 25.0
    """Adjacent layers are gathered together up to this size of their weights, in MiB; a smaller model is gathered once
    per step and kept until its gradients are computed. The default is the bucket size of DistributedDataParallel; 0:
    each layer is gathered separately, with the least memory."""
    tp: PositiveInt = 1
    """Ranks that share each matrix product. The model must have a plan (`tp_plan`)."""
    sequence_parallel: bool = False
    """With `tp`: split the activations between the shared layers along the sequence, which saves memory."""
    tp_plan: dict[str, str] | None = None
    """Layer name (`*` matches one part of it) to style, as in `base_model_tp_plan` of Transformers; None: the model's
    plan."""
    schedule: ScheduleName = "1f1b"
    """Schedule of the pipeline; `interleaved` gives each rank two non-adjacent stages. The number of micro-batches is
    `batch.accumulation_steps`."""
    tp_across_nodes: bool = False
    """Allows a tensor-parallel group to span nodes, whose network is far slower than the GPU links of one node."""

    @model_validator(mode="after")
    def _one_is_open(self) -> Self:
        if self.dp_replicate is None and self.dp_shard is None:
            raise ValueError("dp_replicate and dp_shard are both open; set one of them")
        return self

    def resolve(self, world: int) -> MeshLayout:
        """The layout of `world` workers.

        Raises:
            SpecError: the product of the sizes is not `world`, or `pp_split` has the wrong number of names.
        """
        rest = max(1, world // self.unit)
        replicas, shards = self.dp_replicate or rest, self.dp_shard or rest
        product = self.pp * replicas * shards * self.tp
        if product != world:
            sizes = f"pp {self.pp} x dp_replicate {replicas} x dp_shard {shards} x tp {self.tp}"
            raise SpecError(f"parallelism: {sizes} = {product} ranks, but workers.count is {world}; they must be equal")
        layout = MeshLayout(self.pp, replicas, shards, self.tp, self.sequence_parallel, self.schedule)
        if self.pp_split is not None and len(self.pp_split) != layout.num_stages - 1:
            raise SpecError(
                f"parallelism.pp_split: {len(self.pp_split)} names define {len(self.pp_split) + 1} stages, but the "
                f"layout {layout} has {layout.num_stages}; give {layout.num_stages - 1} names"
            )
        return layout

    @property
    def unit(self) -> int:
        """Number of ranks of one complete model; every layout has a multiple of it."""
        return self.pp * (self.dp_replicate or 1) * (self.dp_shard or 1) * self.tp

    @property
    def together(self) -> int:
        """Number of adjacent ranks that must share a node."""
        return 1 if self.tp_across_nodes else self.tp

    def sizes(self, least: int, most: int) -> list[int]:
        """Valid numbers of ranks, in complete models, from `least` to `most`.

        Raises:
            SpecError: no number is valid.
        """
        last = most if self.dp_replicate is None or self.dp_shard is None else min(most, self.unit)
        found = [size for size in range(self.unit, last + 1, self.unit) if size >= least]
        if not found:
            raise SpecError(
                f"parallelism: pp {self.pp} x dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x tp "
                f"{self.tp} needs a multiple of {self.unit} ranks, and none is from workers.min {least} to workers.max "
                f"{most}; change workers.min and workers.max, or leave dp_replicate or dp_shard open"
            )
        return found


def possible_layouts(max_world: int, *, has_plan: bool, num_layers: int, has_sequence: bool) -> Iterator[MeshLayout]:
    """Every layout of at most `max_world` ranks in which each axis is 1 or 2, or one axis has all ranks.

    Args:
        max_world: largest number of ranks.
        has_plan: whether the model can be split over `tp`.
        num_layers: number of layers that can be split over `pp`; 0: none.
        has_sequence: whether rows are sequences, which `sequence_parallel` can split.
    """
    world = 2
    while world <= max_world:
        sizes = sorted({1, 2, world})
        for pp, shard, tp in product(sizes, sizes, sizes):
            if world % (pp * shard * tp) or (tp > 1 and not has_plan) or (pp > 1 and pp > num_layers):
                continue
            yield from _variants(MeshLayout(pp, world // (pp * shard * tp), shard, tp), num_layers, has_sequence)
        world *= 2


def _variants(layout: MeshLayout, num_layers: int, has_sequence: bool) -> Iterator[MeshLayout]:
    schedules: tuple[ScheduleName, ...] = ("1f1b",)
    if layout.pp == layout.world:
        schedules = ("gpipe", "1f1b", "interleaved") if num_layers >= 2 * layout.pp else ("gpipe", "1f1b")
    for schedule in schedules:
        sizes = layout.sizes
        yield MeshLayout(*sizes, schedule=schedule)
        if layout.tp > 1 and has_sequence:
            yield MeshLayout(*sizes, sequence_parallel=True, schedule=schedule)
