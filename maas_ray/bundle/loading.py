"""From a bundle to an engine: loaded in a process with limits first, kept there unless its graph is known to be harmless.

**Where the line is.** A version runs inside the replica only if all operators of its graph are on the list of those that
no value makes crash (graph/operators.py), no value decides a size or a time, and memory grows in proportion to the request:
nothing but the number of rows is free, and rows are independent. Every other version runs in a process of its own.

Passing a run on costs 135 microseconds at best (1 row of 3 floats: 16 inside, 150 apart; 30,000 rows: 40 and 250; two busy
cores) and 100 microseconds of the replica's processor time, so a tiny model would lose most of its speed, and one whose
run takes 3 ms less than 5 %. A version's first load in a process takes 0.11 s for a tiny graph, of which 4 ms remain where
the same bundle was loaded before; a process that died is replaced in 0.1 to 0.2 s.
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
        bundle: verified bytes of anybody's graph.
        spec: of the engine.
        wall_s: longest time of the load in the process.
        known: what an earlier load in this process learned of the same bundle; a harmless version is then loaded here
            at once.

    Returns:
        The engine, and what is to be remembered.

    Raises:
        BundleError: it is not servable, or loading it kills or hangs the process or takes too much memory.
    """
    if known is not None and not reasons_apart(known):
        return Engine(bundle, spec, known=known), known
    process = start_process(bundle, spec, wall_s)
    if reasons_apart(process.nature):
        return ApartEngine(bundle, spec, process, wall_s), process.nature
    process.close()
    return Engine(bundle, spec, known=process.nature), process.nature


def reasons_apart(nature: Nature) -> tuple[str, ...]:
    """Why a version must not run inside the replica; empty if it may."""
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
