"""Loads a bundle into an engine: first in a process with limits, and in the replica only if its graph is harmless.

**Criterion.** A version runs inside the replica only if all operators of its graph are listed as safe from crashes
(graph/operators.py), no value decides a size or a time, and memory grows proportionally to the request: only the number
of rows is free, and rows are independent. Every other version runs in a separate process.

A run in another process costs at least 135 microseconds more (1 row of 3 floats: 16 inside, 150 apart; 30,000 rows: 40
and 250; two busy cores) and 100 microseconds of the replica's CPU time, so a tiny model would lose most of its speed,
and a model whose run takes 3 ms less than 5 %. A version's first load in a process takes 0.11 s for a tiny graph, and
4 ms if the same bundle was loaded before; a process that died is replaced in 0.1 to 0.2 s.
"""

from maas_ray.bundle.apart.engine import ApartEngine
from maas_ray.bundle.apart.process import start_process
from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.format import Bundle, Signature
from maas_ray.bundle.nature import Nature

AnyEngine = Engine | ApartEngine


def load_engine(
    bundle: Bundle, spec: EngineSpec, *, wall_s: float, known: Nature | None = None
) -> tuple[AnyEngine, Nature]:
    """Loads a bundle, first in a process with limits of time, CPU and memory.

    Args:
        bundle: verified bytes of an untrusted graph.
        spec: spec of the engine.
        wall_s: longest time of the load in the process.
        known: result of an earlier load of the same bundle in this process; a harmless version is then loaded here at
            once.

    Returns:
        The engine, and the result of the load for later loads.

    Raises:
        BundleError: it is not servable, or loading it crashes, hangs or takes too much memory.
    """
    if known is not None and not reasons_apart(known):
        return Engine(bundle, spec, known=known), known
    process = start_process(bundle, spec, wall_s)
    if reasons_apart(process.nature):
        return ApartEngine(bundle, spec, process, wall_s), process.nature
    process.close()
    return Engine(bundle, spec, known=process.nature), process.nature


def reasons_apart(nature: Nature) -> tuple[str, ...]:
    """The reasons why a version must not run inside the replica; empty if it may."""
    hazards = nature.hazards
    found: list[str] = []
    if nature.killed_by:
        found.append(f"{nature.killed_by[0]} killed the process")
    if hazards.can_trap or not hazards.is_value_bounded:
        found.extend(hazards.reasons)
    if nature.not_merged_because and _has_free_size(nature.signature):
        found.append("its memory may grow faster than the request: sizes are free, and rows are not independent")
    elif nature.signature.is_batched and any(-1 in tensor.shape[1:] for tensor in nature.signature.inputs):
        found.append("its memory may grow faster than the request: sizes other than the number of rows are free")
    return tuple(found)


def _has_free_size(signature: Signature) -> bool:
    return any(-1 in tensor.shape for tensor in signature.inputs)
