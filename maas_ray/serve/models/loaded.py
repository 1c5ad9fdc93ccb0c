"""A model version in memory: its batcher, its size, and the time of its last use."""

import asyncio
from dataclasses import dataclass, field
from time import monotonic

from maas_ray.bundle.format import BundleInfo
from maas_ray.bundle.loading import AnyEngine
from maas_ray.decoding.decoder import InputDecoder
from maas_ray.registry.models import Version
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.telemetry.stats import ModelStats
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.serve.wire.v2 import InferCodec

GRAPH_FACTOR = 1.1
"""Measured: a session of a graph of 100 MiB takes 101 to 104 MiB once the memory used for loading is returned."""
SESSION_BYTES = 256 << 10
"""Measured: a session of a graph of 164 bytes takes 115 KiB, without its threads and its queue."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Loaded:
    """A model version in memory, ready to serve."""

    version: Version
    info: BundleInfo
    batcher: Batcher
    runner: EngineRunner
    engine: AnyEngine
    stats: ModelStats
    max_answer_bytes: int = MAX_ANSWER_BYTES
    """Maximum bytes of the tensors of one response."""
    num_bytes: int = 0
    """Bytes counted against the memory budget."""
    decoder: InputDecoder | None = None
    """Decodes image files or texts; None: no input takes them."""
    used_s: float = field(default_factory=monotonic)
    """Time of the last request, on the monotonic clock."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it has sent its last response and released its memory."""
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False)
    """Response headers that name the run and the version of the model."""
    json_headers: tuple[tuple[bytes, bytes], ...] = field(init=False)
    """The same with the content type of a JSON response: built once, since every response needs them."""
    codec: InferCodec = field(init=False)
    """Parses its requests and writes its responses."""

    def __post_init__(self) -> None:
        self.headers = (
            (b"x-maas-run", self.version.run.encode("ascii", "replace")),
            (b"x-maas-version", str(self.version.version).encode()),
        )
        self.json_headers = ((b"content-type", b"application/json"), *self.headers)
        self.codec = InferCodec(self.version.model, self.version.version, self.info, self.max_answer_bytes)

    @property
    def name(self) -> str:
        """Name for messages."""
        return name_of(self.version)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return self.batcher.num_ongoing == 0 and self.batcher.busy_s == 0.0


def name_of(version: Version) -> str:
    """Returns the name of a version for messages."""
    return f"model {version.model!r} version {version.version}"


def memory_of(graph_bytes: int) -> int:
    """Returns the bytes that a model counts against the memory budget, without the buffers of its runs."""
    return int(graph_bytes * GRAPH_FACTOR) + SESSION_BYTES
