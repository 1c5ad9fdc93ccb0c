"""How the ranks of a run are arranged: the sizes of the one device mesh. Knows no torch and no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from maas_ray.errors import SpecError
from maas_ray.spec import Spec

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Names of the mesh's dimensions, outermost first: neighbouring ranks, on one node, are in the same tensor-parallel
group, which talks most."""

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True)
class MeshLayout:
    """The sizes of the mesh; their product is the number of ranks."""

    pp: int = 1
    """Pipeline stages (or groups of stages, if they are interleaved): each rank has a part of the layers."""
    dp_replicate: int = 1
    """Whole replicas of the model, or of its shards: each has its own rows."""
    dp_shard: int = 1
    """Ranks over which weights, gradients and optimizer state of a replica are sharded (FSDP2); each has its own rows."""
    tp: int = 1
    """Ranks that share each matrix product of the layers that the model's plan names."""
    sequence_parallel: bool = False
    """Whether the activations between those layers are cut along the sequence over the `tp` ranks."""
    schedule: ScheduleName = "1f1b"
    """Order in which a pipeline takes the micro-batches."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of the mesh, in the order of `AXES`."""
        return self.pp, self.dp_replicate, self.dp_shard, self.tp

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.tp

    @property
    def dp(self) -> int:
        """Ranks with rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def cuts_model(self) -> bool:
        """Whether a rank has pieces of the model, and not all of it."""
        return self.pp > 1 or self.dp_shard > 1 or self.tp > 1

    @property
    def num_stages(self) -> int:
        """Pieces into which the layers are cut."""
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

    `dp_replicate` or `dp_shard` may be left to the number of workers, and is what grows and shrinks with it. Ranks that are neighbours are in the same tensor-parallel group; pipeline stages are farthest apart.
    """

    pp: PositiveInt = 1
    """Pipeline stages, of about equally many weights."""
    pp_split: list[str] | None = None
    """Names of the layers that begin the second and each later stage (with `interleaved` there are twice as many stages);
    None: chosen by size."""
    dp_replicate: PositiveInt | None = None
    """Replicas; None: as many as the workers allow."""
    dp_shard: PositiveInt | None = 1
    """Ranks over which each replica's weights, gradients and optimizer state are sharded (FSDP2); None, with a number
    for `dp_replicate`: over as many as the workers allow."""
    shard_unit_mib: NonNegativeFloat = 25.0
    """Neighbouring layers are gathered together until they have so many MiB of weights; what is smaller in all is gathered
    once a step and kept until its gradients are there. As large as the buckets of DistributedDataParallel; 0: each layer by
    itself, which takes the least memory."""
    tp: PositiveInt = 1
    """Ranks that share each matrix product. The model has to have a plan (`tp_plan`)."""
    sequence_parallel: bool = False
    """With `tp`: activations between the shared layers are cut along the sequence, which saves memory."""
    tp_plan: dict[str, str] | None = None
    """Layer name (`*` stands for one part of it) to style, in the words of transformers' `base_model_tp_plan`; None: the
    model's own."""
    schedule: ScheduleName = "1f1b"
    """Of the pipeline; `interleaved` gives each rank two stages that are not neighbours. The micro-batches are
    `batch.accumulation_steps`."""
    tp_across_nodes: bool = False
    """Allows a tensor-parallel group to span nodes, whose network is far slower than what connects GPUs inside one."""

    @model_validator(mode="after")
    def _one_is_open(self) -> Self:
        if self.dp_replicate is None and self.dp_shard is None:
            raise ValueError("dp_replicate and dp_shard are both left to the workers; give one of them a number")
        return self

    def resolve(self, world: int) -> MeshLayout:
        """The layout of so many workers.

        Raises:
            SpecError: the sizes do not multiply to `world`, or `pp_split` names another number of stages.
        """
        rest = max(1, world // self.unit)
        replicas, shards = self.dp_replicate or rest, self.dp_shard or rest
        product = self.pp * replicas * shards * self.tp
        if product != world:
            sizes = f"pp {self.pp} x dp_replicate {replicas} x dp_shard {shards} x tp {self.tp}"
            raise SpecError(
                f"parallelism: {sizes} = {product} ranks, and workers.count is {world}; they have to be equal"
            )
        layout = MeshLayout(self.pp, replicas, shards, self.tp, self.sequence_parallel, self.schedule)
        if self.pp_split is not None and len(self.pp_split) != layout.num_stages - 1:
            raise SpecError(
                f"layout.pp_split: {len(self.pp_split)} names begin {len(self.pp_split) + 1} stages, and the layout {layout} "
                f"has {layout.num_stages}; give {layout.num_stages - 1} names"
            )
        return layout

    @property
    def unit(self) -> int:
        """Ranks of the smallest whole model; every layout has a multiple of them."""
        return self.pp * (self.dp_replicate or 1) * (self.dp_shard or 1) * self.tp

    @property
    def together(self) -> int:
        """Neighbouring ranks that have to be on one node."""
        return 1 if self.tp_across_nodes else self.tp

    def sizes(self, least: int, most: int) -> list[int]:
        """Numbers of ranks, in whole models, from `least` to `most`.

        Raises:
            SpecError: there is none.
        """
        last = most if self.dp_replicate is None or self.dp_shard is None else min(most, self.unit)
        found = [size for size in range(self.unit, last + 1, self.unit) if size >= least]
        if not found:
            raise SpecError(
                f"layout: with pp {self.pp} x dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x tp {self.tp} "
                f"a whole model takes {self.unit} ranks, and no fitting number of workers is from {least} to {most}; "
                "change workers.min and workers.max, or leave dp_replicate or dp_shard open"
            )
        return found


def possible_layouts(max_world: int, *, has_plan: bool, num_layers: int, has_sequence: bool) -> Iterator[MeshLayout]:
    """Every arrangement of at most so many ranks in which each axis is 1 or 2, or one axis has all ranks.

    Args:
        max_world: most ranks.
        has_plan: whether the model can be split over `tp`.
        num_layers: layers that can be split over `pp`; 0: none.
        has_sequence: whether rows are sequences, which `sequence_parallel` can cut.
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
