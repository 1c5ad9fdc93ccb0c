"""Writes one rank's parts: one part is copied while another is written and hashed. Independent of other ranks."""

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from maas_ray.checkpoint.copying import beside_computing, copy_bits, copy_values, new_buffer, wait_for_copies
from maas_ray.checkpoint.parts import PartLayout, fill_header, fill_tiles, seal_part
from maas_ray.checkpoint.pieces import TensorPiece
from maas_ray.checkpoint.plan import SaveAttempt
from maas_ray.errors import SaveFailed
from maas_ray.store.manifest import Part, part_key
from maas_ray.store.objects import ObjectStore

IN_FLIGHT = 2
"""Parts in flight at a time: one is copied, or waits for the disk, while another is written."""

_GRACE_S = 5.0


@dataclass(frozen=True)
class Written:
    """A part that was written to the store."""

    layout: PartLayout
    part: Part
    digests: list[str]
    """The `piece_digest` of each tile in hex, in the order of the layout's slots."""


class UploadSource(Protocol):
    """A source of the bytes of parts."""

    def lend(self, number: int, layout: PartLayout) -> AbstractContextManager[Tensor]:
        """The bytes (uint8) of one part, valid within the context. Called by several threads."""
        ...


class Filled:
    """Fills a few buffers in turn from the live tensors, which must not change meanwhile.

    Args:
        pieces: this rank's pieces of tensors.
    """

    def __init__(self, pieces: Mapping[str, TensorPiece]) -> None:
        self._pieces = pieces
        self._free: list[Tensor] = []
        self._lock = threading.Lock()
        wait_for_copies(piece.local for piece in pieces.values())

    @contextmanager
    def lend(self, number: int, layout: PartLayout) -> Iterator[Tensor]:
        with self._lock:
            fits = [buffer for buffer in self._free if buffer.numel() >= layout.size]
            buffer = fits[0] if fits else new_buffer(layout.size)
            self._free = [other for other in self._free if other is not buffer]
        fill_header(layout, buffer)
        fill_tiles(layout, buffer, self._pieces, copy_bits)
        wait_for_copies(piece.local for piece in self._pieces.values())
        yield buffer[: layout.size]
        with self._lock:
            self._free.append(buffer)


class Staging:
    """Copies of a rank's parts in reused memory; pinned if tensors are on a GPU (not tested on one)."""

    def __init__(self) -> None:
        self._layouts: tuple[PartLayout, ...] = ()
        self._buffers: list[Tensor] = []

    def fill(self, attempt: SaveAttempt, later: Collection[str] = ()) -> None:
        """Copies this rank's tensors except those named in `later`; the copied ones may then change."""
        if attempt.layouts is not self._layouts:
            self._buffers = []  # released before new ones are allocated
            is_pinned = any(piece.local.is_cuda for piece in attempt.pieces.values())
            self._buffers = [new_buffer(layout.size, is_pinned=is_pinned) for layout in attempt.layouts]
            self._layouts = attempt.layouts
        for layout, buffer in zip(attempt.layouts, self._buffers, strict=True):
            fill_header(layout, buffer)
            fill_tiles(layout, buffer, attempt.pieces, copy_values, without=later)
        wait_for_copies(piece.local for piece in attempt.pieces.values())

    def fill_later(self, attempt: SaveAttempt, later: Mapping[str, TensorPiece]) -> None:
        """Copies the tensors that `fill` omitted, in a thread other than the computing one."""
        with beside_computing(piece.local.device for piece in later.values()):
            for layout, buffer in zip(attempt.layouts, self._buffers, strict=True):
                fill_tiles(layout, buffer, later, copy_bits, without=attempt.pieces.keys() - later.keys())

    @contextmanager
    def lend(self, number: int, layout: PartLayout) -> Iterator[Tensor]:
        yield self._buffers[number]


def upload(
    store: ObjectStore,
    where: str,
    attempt: SaveAttempt,
    source: UploadSource,
    timeout_s: float,
    in_flight: int | None = None,
) -> list[Written]:
    """Writes this rank's parts of an attempt.

    Args:
        store: where to write.
        where: prefix of the checkpoint.
        attempt: the attempt to write.
        source: source of the bytes.
        timeout_s: longest time for all parts.
        in_flight: parts in flight at a time; None: `IN_FLIGHT`.

    Raises:
        SaveFailed: a part could not be written, or not in time; the message names it. Parts in flight may still arrive.
    """
    deadline = time.monotonic() + timeout_s

    def write(number: int, layout: PartLayout) -> Written:
        key = part_key(where, attempt.name, layout.name)
        with source.lend(number, layout) as buffer:
            data = memoryview(buffer.numpy())  # type: ignore[arg-type]
            sealed = hashing.submit(seal_part, layout, key, data)  # concurrently with writing: both only read
            try:
                store.put(key, data)
            finally:
                part, digests = sealed.result()  # before the buffer is released
        return Written(layout, part, digests)

    hashing = ThreadPoolExecutor(in_flight or IN_FLIGHT, thread_name_prefix="checkpoint-hash")
    pool = ThreadPoolExecutor(in_flight or IN_FLIGHT, thread_name_prefix="checkpoint-part")
    futures: list[Future[Written]] = []
    try:
        futures = [pool.submit(write, number, layout) for number, layout in enumerate(attempt.layouts)]
        return [
            _result(future, part_key(where, attempt.name, layout.name), deadline, timeout_s)
            for future, layout in zip(futures, attempt.layouts, strict=True)
        ]
    except BaseException:
        # Parts in flight end soon and can then be removed; does not wait for a store that hangs.
        pool.shutdown(wait=False, cancel_futures=True)
        wait(futures, timeout=max(0.0, min(_GRACE_S, deadline - time.monotonic())))
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        hashing.shutdown(wait=False)


def _result(future: Future[Written], key: str, deadline: float, timeout_s: float) -> Written:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        raise SaveFailed(
            f"{key} was not written within {timeout_s:g} s; raise the timeout, or check the store"
        ) from error
    except Exception as error:
        reason = str(error)
        raise SaveFailed(reason if key in reason else f"{key}: {reason}") from error
