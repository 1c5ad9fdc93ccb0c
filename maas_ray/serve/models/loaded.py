"""A model version in memory: what answers, what it weighs and when it was last asked for. Decides nothing."""

import asyncio
from dataclasses import dataclass, field
from time import monotonic

from maas_ray.bundle.format import BundleInfo
from maas_ray.bundle.loading import AnyEngine
from maas_ray.registry.models import Version
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.telemetry.stats import ModelStats
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.serve.wire.v2 import InferCodec

GRAPH_FACTOR = 1.1
"""Measured: a session of a graph of 100 MiB takes 101 to 104 MiB once the memory of loading it is given back."""
SESSION_BYTES = 256 << 10
"""Measured: a session of a graph of 164 bytes takes 115 KiB, its threads and its queue not counted."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Loaded:
    """A model version in memory, ready to answer."""

    version: Version
    info: BundleInfo
    batcher: Batcher
    runner: EngineRunner
    engine: AnyEngine
    stats: ModelStats
    max_answer_bytes: int = MAX_ANSWER_BYTES
    """Most bytes of an answer's tensors."""
    num_bytes: int = 0
    """What it counts against the memory budget."""
    used_s: float = field(default_factory=monotonic)
    """When it was last asked for, by the monotonic clock."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it has answered everything and given its memory back."""
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False)
    """What leads an answer back to the run and the version it came from."""
    json_headers: tuple[tuple[bytes, bytes], ...] = field(init=False)
    """The same with the content type of a JSON answer: made once, since each answer needs it."""
    codec: InferCodec = field(init=False)
    """Reads its requests and writes its answers."""

    def __post_init__(self) -> None:
        self.headers = (
            (b"x-maas-run", self.version.run.encode("ascii", "replace")),
            (b"x-maas-version", str(self.version.version).encode()),
        )
        self.json_headers = ((b"content-type", b"application/json"), *self.headers)
        self.codec = InferCodec(self.version.model, self.version.version, self.info, self.max_answer_bytes)

    @property
    def name(self) -> str:
        """For messages."""
        return name_of(self.version)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer and nothing runs."""
        return self.batcher.num_ongoing == 0 and self.batcher.busy_s == 0.0


def name_of(version: Version) -> str:
    """A version as messages name it."""
    return f"model {version.model!r} version {version.version}"


def memory_of(graph_bytes: int) -> int:
    """Bytes that a model counts against the memory budget; buffers of its runs are not in it."""
    return int(graph_bytes * GRAPH_FACTOR) + SESSION_BYTES
