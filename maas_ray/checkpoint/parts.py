"""Parts: safetensors files of at most some megabytes, made of tiles that are hashed one by one. Knows no other rank."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem

from maas_ray.checkpoint.copying import copy_bits
from maas_ray.checkpoint.dtypes import NAMES
from maas_ray.checkpoint.pieces import TensorPiece
from maas_ray.store.manifest import Part, piece_digest

PART_BYTES = 64 << 20
MAX_PART_BYTES = 256 << 20
PARTS_PER_RANK = 128
"""Parts grow with what a rank writes, so that there are about this many, within the two limits above."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class TileSlot:
    """The place of one tile in a part."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int

    def values(self, buffer: Tensor) -> Tensor:
        """The tile's values inside of its part's bytes."""
        return buffer[self.start : self.start + self.size].view(self.dtype).view(self.sizes)


@dataclass(frozen=True)
class PartLayout:
    """A part before it has values: a safetensors header and the places of its tiles, without gaps."""

    name: str
    header: bytes
    slots: tuple[TileSlot, ...]
    size: int

    @property
    def pieces(self) -> tuple[int, ...]:
        """Sizes of what is hashed one by one: the header and every tile."""
        return (len(self.header), *(slot.size for slot in self.slots))


def lay_out(items: Sequence[WriteItem], rank: int, part_bytes: int | None = None) -> list[PartLayout]:
    """Packs the tiles that a rank writes into parts; tiles of one tensor stay side by side, for readers of many.

    Args:
        items: what torch's planner gave to this rank.
        rank: numbers the parts.
        part_bytes: largest part; only a tile that is larger makes a larger one.
    """
    limit = part_bytes or min(max(sum(map(_nbytes, items)) // PARTS_PER_RANK, PART_BYTES), MAX_PART_BYTES)
    groups: list[list[WriteItem]] = []
    room = 0
    for item in items:
        size = _nbytes(item)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room -= size
    return [lay_out_part(f"{rank:05d}-{number:05d}.safetensors", group) for number, group in enumerate(groups)]


def lay_out_part(name: str, items: Sequence[WriteItem]) -> PartLayout:
    """One part: those with large elements come first, so that every element lies at a multiple of its size."""
    header: dict[str, object] = {}
    places = []
    end = 0
    for item in sorted(items, key=lambda item: -_data(item).properties.dtype.itemsize):
        data, size = _data(item), _nbytes(item)
        offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        shown = ",".join(f"{offset}:{offset + length}" for offset, length in zip(offsets, sizes, strict=True))
        header[item.index.fqn if sizes == tuple(data.size) else f"{item.index.fqn}[{shown}]"] = {
            "dtype": NAMES[data.properties.dtype],
            "shape": sizes,
            "data_offsets": [end, end + size],
        }
        places.append((item.index.fqn, offsets, sizes, data.properties.dtype, end, size))
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # the format allows spaces here; values then lie aligned
    head = len(text).to_bytes(8, "little") + text
    slots = tuple(
        TileSlot(tensor, offsets, sizes, dtype, len(head) + start, size)
        for tensor, offsets, sizes, dtype, start, size in places
    )
    return PartLayout(name, head, slots, len(head) + end)


def fill_header(layout: PartLayout, buffer: Tensor) -> None:
    """Copies the header into a part's buffer (uint8)."""
    copy_bits(buffer[: len(layout.header)], torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))


def fill_tiles(
    layout: PartLayout,
    buffer: Tensor,
    pieces: Mapping[str, TensorPiece],
    copy: Callable[[Tensor, Tensor], None],
    without: Collection[str] = (),
) -> None:
    """Copies tiles into a part's buffer, but for those of some tensors; from a GPU without waiting for the copies."""
    for slot in layout.slots:
        if slot.size and slot.tensor not in without:
            copy(slot.values(buffer), pieces[slot.tensor].tile(slot.offsets, slot.sizes))


def seal_part(layout: PartLayout, key: str, data: memoryview) -> tuple[Part, list[str]]:
    """The part as the manifest names it, and the `piece_digest` of each of its tiles in hex; every byte is hashed once."""
    digests = [piece_digest(data[slot.start : slot.start + slot.size]) for slot in layout.slots]
    joined = b"".join([piece_digest(layout.header), *digests])
    return Part(key, layout.size, sha256(joined).hexdigest(), layout.pieces), [each.hex() for each in digests]


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    return item.tensor_data


def _nbytes(item: WriteItem) -> int:
    return int(_data(item).chunk.sizes.numel() * _data(item).properties.dtype.itemsize)
