"""Rules for operators that rearrange elements or create tensors of a shape: the new dimension of the rows."""

from collections.abc import Sequence
from dataclasses import replace

from maas_ray.bundle.axis.nodes import GraphNode, plain, resized
from maas_ray.bundle.axis.sizes import BATCH, ONE, Number, Size, product, whole
from maas_ray.bundle.axis.values import Refusal, Sizes, Value, held, spread, unsure

_INT64 = 7


def reshaped(value: Value, shape: Sequence[Size]) -> Value:
    """A value in another shape with as many elements: their order is unchanged, so the rows are found by their stride.

    Raises:
        Refusal: the rows are not in one dimension afterward, or the sizes are insufficient to decide it.
    """
    content = value.numbers if len(shape) <= 1 else None
    if value.axis is None:
        if any(size.num_rows for size in shape):
            raise Refusal("reshapes a tensor by the number of rows")
        return replace(value, shape=tuple(shape), content=content, parts=())
    stride = product((value.inner, *value.sizes[value.axis + 1 :]))
    for axis, size in enumerate(shape):
        if size.num_rows != 1:
            continue
        if size == value.sizes[value.axis] and product(shape[:axis]) == product(value.sizes[: value.axis]):
            return resized(value, shape, axis=axis)
        inner = stride.over(product(shape[axis + 1 :]))
        if inner is None or size.over(product((BATCH, inner))) is None:
            continue
        return replace(resized(value, shape, axis=axis), inner=inner)
    raise Refusal("reshapes across the boundaries of rows")


def reshape(node: GraphNode) -> list[Value]:
    """Reshape: 0 copies a size, -1 is inferred."""
    value = node.input(0)
    wanted = node.numbers(1) if len(node.inputs) > 1 else tuple(Size(each) for each in node.ints("shape") or [])
    if wanted is None:
        raise unsure("computes its shape at run time")
    copies = not node.whole("allowzero", 0)
    sizes: list[Size | None] = []
    for axis, number in enumerate(wanted):
        plain_number = whole(number)
        if plain_number == 0 and copies:
            sizes.append(value.sizes[axis])
        elif plain_number == -1:
            sizes.append(None)
        else:
            sizes.append(node.size(number, f"shape {axis}"))
    return [reshaped(value, _filled(node, value, sizes))]


def _filled(node: GraphNode, value: Value, sizes: Sequence[Size | None]) -> Sizes:
    """The sizes with the inferred one."""
    known = product(size for size in sizes if size is not None)
    if None not in sizes:
        return tuple(size for size in sizes if size is not None)
    rest = None if value.shape is None else product(value.shape).over(known)
    if rest is None:
        if value.axis is not None and not known.num_rows:
            raise Refusal("reshapes across the boundaries of rows")
        rest = node.name("rest")
    return tuple(rest if size is None else size for size in sizes)


def flatten(node: GraphNode) -> list[Value]:
    """Flatten: the dimensions before an axis and from it on become two dimensions."""
    value = node.input(0)
    axis = node.whole("axis", 1)
    axis = axis + value.rank if axis < 0 else axis
    return [reshaped(value, (product(value.sizes[:axis]), product(value.sizes[axis:])))]


def transpose(node: GraphNode) -> list[Value]:
    """Transpose."""
    value = node.input(0)
    order = node.ints("perm") or list(reversed(range(value.rank)))
    axis = None if value.axis is None else order.index(value.axis)
    return [plain_unless_vector(value, resized(value, [value.sizes[each] for each in order], axis=axis))]


def plain_unless_vector(value: Value, result: Value) -> Value:
    """Keeps the elements of a vector."""
    return replace(result, content=value.content) if value.rank <= 1 else result


def _axes(node: GraphNode) -> list[int] | None:
    return node.ints("axes") if "axes" in node.attributes else node.known(1)


def squeeze(node: GraphNode) -> list[Value]:
    """Squeeze: without axes it removes all dimensions of size 1, and there may be one row."""
    value = node.input(0)
    axes = _axes(node)
    if axes is None:
        if value.axis is not None or not all(size.is_number for size in value.sizes):
            raise Refusal("removes every dimension of size 1, which includes the rows if there is only one")
        axes = [axis for axis, size in enumerate(value.sizes) if size == ONE]
    dropped = {node.apart(value, axis) for axis in axes}
    sizes = [size for axis, size in enumerate(value.sizes) if axis not in dropped]
    place = None if value.axis is None else value.axis - sum(axis < value.axis for axis in dropped)
    result = resized(value, sizes, axis=place)
    return [replace(result, content=value.numbers if value.axis is None else None)]


def unsqueeze(node: GraphNode) -> list[Value]:
    """Unsqueeze."""
    value = node.input(0)
    axes = _axes(node)
    if axes is None:
        raise unsure("computes its axes at run time")
    rank = value.rank + len(axes)
    added = {axis + rank if axis < 0 else axis for axis in axes}
    rest = iter(value.sizes)
    sizes = [ONE if axis in added else next(rest) for axis in range(rank)]
    kept = [axis for axis in range(rank) if axis not in added]
    place = None if value.axis is None else kept[value.axis]
    result = resized(value, sizes, axis=place)
    return [replace(result, content=value.numbers if value.axis is None and rank <= 1 else None)]


def shape_of(node: GraphNode) -> list[Value]:
    """Shape: may contain the number of rows."""
    sizes = node.input(0).sizes
    rank = len(sizes)
    start, end = node.whole("start", 0), node.whole("end", rank)
    found = sizes[slice(start, end)]
    return [held((Size(len(found)),), found, _INT64)]


def size_of(node: GraphNode) -> list[Value]:
    """Size."""
    return [held((), (product(node.input(0).sizes),), _INT64)]


def expand(node: GraphNode) -> list[Value]:
    """Expand: a tensor without rows has rows in a dimension whose size of 1 becomes the number of rows."""
    value = node.input(0)
    numbers = node.numbers(1)
    if numbers is None:
        raise unsure("computes its shape at run time")
    wanted = [node.size(number, f"shape {axis}") for axis, number in enumerate(numbers)]
    if value.axis is None and any(size.num_rows for size in wanted):
        return [_given_rows(node, value, wanted)]
    target = Value(tuple(wanted), *_same_place(value, wanted))
    result = node.broadcast(plain(value), target)
    return [replace(result, dtype=value.dtype, is_position=value.is_position, by_place=value.by_place)]


def _same_place(value: Value, wanted: Sequence[Size]) -> tuple[int | None, Size]:
    """The dimension of a target shape that is the number of rows, if there is one."""
    places = [axis for axis, size in enumerate(wanted) if size.num_rows]
    if len(places) > 1 or (places and wanted[places[0]] != value.sizes[value.axis or 0]):
        raise Refusal("repeats its rows by the number of rows")
    return (places[0], value.inner) if places else (None, ONE)


def _given_rows(node: GraphNode, value: Value, wanted: Sequence[Size]) -> Value:
    if value.by_rows:
        raise Refusal("uses the number of rows as a value")
    made = spread(wanted, value.dtype)
    place = (made.axis or 0) - len(wanted) + value.rank
    if place >= 0 and value.sizes[place] != ONE:
        raise Refusal("broadcasts a tensor over the rows by their index")
    sizes = list(made.sizes)
    if value.rank > len(wanted):
        sizes = [*value.sizes[: value.rank - len(wanted)], *sizes]
    shift = len(sizes) - len(wanted)
    for axis, size in enumerate(reversed(value.sizes)):
        if size != ONE and sizes[-1 - axis] == ONE:
            sizes[-1 - axis] = size
    return Value(tuple(sizes), (made.axis or 0) + shift, made.inner, dtype=value.dtype)


def tile(node: GraphNode) -> list[Value]:
    """Tile: repeats each dimension; a tensor without rows has rows in a dimension that is repeated once per row."""
    value = node.input(0)
    numbers = node.numbers(1)
    if numbers is None or len(numbers) != value.rank:
        raise unsure("computes its repeats at run time")
    repeats = [node.size(number, f"repeat {axis}") for axis, number in enumerate(numbers)]
    sizes = [size.times(times) for size, times in zip(value.sizes, repeats, strict=True)]
    places = [axis for axis, times in enumerate(repeats) if times.num_rows]
    if not places:
        return [resized(value, sizes)]
    if value.axis is not None or value.by_rows or len(places) > 1 or repeats[places[0]] != BATCH:
        raise Refusal("repeats its rows by the number of rows")
    return [Value(tuple(sizes), places[0], value.sizes[places[0]], dtype=value.dtype)]


def constant_of_shape(node: GraphNode) -> list[Value]:
    """ConstantOfShape."""
    numbers = node.numbers(0)
    if numbers is None:
        raise unsure("computes its shape at run time")
    sizes = [node.size(number, f"shape {axis}") for axis, number in enumerate(numbers)]
    given = node.attributes.get("value")
    filled = given if isinstance(given, Value) else None
    number: Number = filled.content[0] if filled is not None and filled.content else Size(0)
    dtype = filled.dtype if filled is not None else 1
    count = whole(sizes[0]) if len(sizes) == 1 else None
    if count is not None and 0 <= count <= 64:
        return [held(sizes, (number,) * count, dtype)]
    return [spread(sizes, dtype)]


def pad(node: GraphNode) -> list[Value]:
    """Pad: nothing may be added before or after the rows."""
    value = node.data(0)
    node.common(2)
    pads: Sequence[Number] | None
    if "pads" in node.attributes or "paddings" in node.attributes:
        pads = [Size(each) for each in node.ints("pads") or node.ints("paddings") or []]
    else:
        pads = node.numbers(1)
    axes = node.known(3) or list(range(value.rank))
    if pads is None or len(pads) != 2 * len(axes):
        raise unsure("computes its padding at run time")
    sizes = list(value.sizes)
    for place, axis in enumerate(axes):
        before, after = pads[place], pads[place + len(axes)]
        if (before, after) == (Size(0), Size(0)):
            continue
        axis = node.apart(value, axis)
        node.refuse_sized((before, after))
        known = [whole(before), whole(after), whole(sizes[axis])]
        sizes[axis] = node.name(f"padded {axis}") if None in known else Size(sum(each or 0 for each in known))
    return [resized(value, sizes)]


def range_of(node: GraphNode) -> list[Value]:
    """Range: from 0 to the number of rows it is the index of each row."""
    numbers = [node.numbers(index) for index in range(3)]
    if any(each is None or len(each) != 1 for each in numbers):
        raise unsure("computes its limits at run time")
    start, limit, delta = (each[0] for each in numbers if each is not None)
    dtype = node.input(0).dtype
    if (start, limit, delta) == (Size(0), BATCH, ONE):
        return [Value((BATCH,), 0, dtype=dtype, is_position=True)]
    node.refuse_sized((start, limit, delta))
    known = [whole(each) for each in (start, limit, delta)]
    if None not in known and known[2]:
        found = range(known[0] or 0, known[1] or 0, known[2])
        if len(found) <= 64:
            return [held((Size(len(found)),), [Size(each) for each in found], dtype)]
    return [Value((node.name("count"),), dtype=dtype)]


def blocks(node: GraphNode) -> list[Value]:
    """DepthToSpace and SpaceToDepth, per image."""
    value = node.leading(node.data(0))
    number, channels, height, width = value.sizes
    block = Size(node.whole("blocksize", 1))
    if node.op == "DepthToSpace":
        fewer = channels.over(block.times(block)) or node.name("channels")
        return [resized(value, (number, fewer, height.times(block), width.times(block)))]
    sides = [side.over(block) or node.name(f"side {axis}") for axis, side in enumerate((height, width))]
    return [resized(value, (number, channels.times(block.times(block)), *sides))]


def trilu(node: GraphNode) -> list[Value]:
    """Trilu: a part of each matrix."""
    value = node.data(0)
    node.common(1)
    node.before(value, value.rank - 2)
    return [plain(value)]


RULES = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Shape": shape_of,
    "Size": size_of,
    "Expand": expand,
    "Tile": tile,
    "ConstantOfShape": constant_of_shape,
    "Pad": pad,
    "Range": range_of,
    "DepthToSpace": blocks,
    "SpaceToDepth": blocks,
    "Trilu": trilu,
}
