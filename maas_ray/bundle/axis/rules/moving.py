"""Rules for operators that gather, concatenate, slice, split and scatter tensors."""

from collections.abc import Sequence
from dataclasses import replace

from maas_ray.bundle.axis.nodes import GraphNode, plain, resized
from maas_ray.bundle.axis.sizes import ONE, Number, Size, whole
from maas_ray.bundle.axis.values import Refusal, Value, held, unsure

_TO_THE_END = (1 << 31) - 1
"""Exporters use at least this number for "to the end"."""


def gather(node: GraphNode) -> list[Value]:
    """Gather: whole slices by index along one axis."""
    value, indices = node.input(0), node.input(1)
    axis = node.whole("axis", 0)
    axis = axis + value.rank if axis < 0 else axis
    numbers = value.numbers
    if numbers is not None and value.axis is None and value.rank == 1 and indices.axis is None and indices.rank <= 1:
        chosen = [whole(number) for number in indices.numbers or ()]
        if chosen and None not in chosen:
            return [held(indices.sizes, [numbers[each or 0] for each in chosen], value.dtype)]
    value, indices = node.data(0), node.data(1)
    if value.axis is not None and indices.axis is not None:
        raise unsure("gathers rows from rows")
    node.apart(value, axis)
    sizes = [*value.sizes[:axis], *indices.sizes, *value.sizes[axis + 1 :]]
    if indices.axis is not None:
        return [Value(tuple(sizes), axis + indices.axis, indices.inner, dtype=value.dtype)]
    shift = indices.rank - 1 if value.axis is not None and value.axis > axis else 0
    return [resized(value, sizes, axis=None if value.axis is None else value.axis + shift)]


def gather_elements(node: GraphNode) -> list[Value]:
    """GatherElements: single elements along one axis, at the same index in all other axes."""
    value, indices = node.data(0), node.data(1)
    axis = node.whole("axis", 0)
    axis = axis + value.rank if axis < 0 else axis
    if value.axis is None and indices.axis is not None:
        if indices.axis != axis:
            raise Refusal("gathers elements by the index of a row")
        return [replace(plain(indices), dtype=value.dtype)]
    node.apart(value, axis)
    _same_rows(value, indices)
    return [replace(plain(indices), dtype=value.dtype)]


def gather_nd(node: GraphNode) -> list[Value]:
    """GatherND, with the rows among its batch dimensions, or gathered by each row's own index."""
    value, indices = node.input(0), node.input(1)
    dims = node.whole("batch_dims", 0)
    depth = whole(indices.sizes[-1])
    if depth is None:
        raise unsure("gathers elements by indices of unknown depth")
    if dims == 0 and value.axis == 0 and value.inner == ONE and indices.parts[:1] == (True,):
        if any(indices.parts[1:]) or indices.by_place or value.is_position or value.by_place or value.by_rows:
            raise Refusal("gathers elements by the index of a row")
        sizes = [*indices.sizes[:-1], *value.sizes[depth:]]
        return [Value(tuple(sizes), indices.axis, indices.inner, dtype=value.dtype)]
    value, indices = node.data(0), node.data(1)
    sizes = [*indices.sizes[:-1], *value.sizes[dims + depth :]]
    if value.axis is None and (indices.axis is None or indices.axis >= dims):
        return [Value(tuple(sizes), indices.axis, indices.inner, dtype=value.dtype)]
    _same_rows(value, indices)
    if value.axis is None or value.axis >= dims:
        raise Refusal("gathers elements across the rows")
    return [resized(value, sizes)]


def _same_rows(*values: Value) -> None:
    """Rejects tensors unless the rows of all are in the same dimension in the same way."""
    places = {
        (value.axis, value.inner, value.sizes[value.axis or 0] if value.axis is not None else None) for value in values
    }
    if len(places) > 1:
        raise Refusal("combines rows by their index")


def scatter(node: GraphNode) -> list[Value]:
    """ScatterElements."""
    value, indices, updates = node.data(0), node.data(1), node.data(2)
    for each in (value, indices, updates):
        node.apart(each, node.whole("axis", 0) % max(1, value.rank))
    _same_rows(value, indices, updates)
    return [plain(value)]


def scatter_nd(node: GraphNode) -> list[Value]:
    """ScatterND at each row's own index."""
    value, indices, updates = node.data(0), node.input(1), node.data(2)
    if all(each.is_common for each in (value, indices, updates)):
        return [plain(value)]
    own = indices.parts[:1] == (True,) and not any(indices.parts[1:]) and not indices.by_place
    if (
        not own
        or value.axis != 0
        or value.inner != ONE
        or updates.axis != indices.axis
        or updates.inner != indices.inner
    ):
        raise Refusal("scatters elements by the index of a row")
    return [plain(value)]


def slice_of(node: GraphNode) -> list[Value]:
    """Slice: must keep all rows."""
    value = node.input(0)
    starts: Sequence[Number]
    ends: Sequence[Number]
    steps: Sequence[Number]
    if node.opset < 10:
        starts, ends, steps = ([Size(each) for each in node.ints(name) or []] for name in ("starts", "ends", "steps"))
        axes = node.ints("axes")
    else:
        found = [node.numbers(index) for index in (1, 2, 4)]
        if found[0] is None or found[1] is None or (found[2] is None and node.maybe(4) is not None):
            raise unsure("computes its slice at run time")
        starts, ends, steps = (list(each or ()) for each in found)
        axes = node.known(3)
    axes = list(range(len(starts))) if axes is None else axes
    sizes: list[Size] = list(value.sizes)
    for place, axis in enumerate(axes):
        axis = axis + value.rank if axis < 0 else axis
        start, end, step = starts[place], ends[place], steps[place] if steps else ONE
        bounds = (whole(start), whole(end), whole(step))
        is_whole = bounds[0] == 0 and bounds[2] == 1 and (end == sizes[axis] or (bounds[1] or 0) >= _TO_THE_END)
        if is_whole:
            continue
        node.apart(value, axis)
        node.refuse_sized([each for each in (start, end, step) if each != sizes[axis]])
        length = whole(sizes[axis])
        if value.rank == 1 and value.numbers is not None and None not in bounds:
            numbers = value.numbers[slice(*bounds)]
            return [held((Size(len(numbers)),), numbers, value.dtype)]
        known = None not in bounds and length is not None
        sizes[axis] = Size(len(range(length or 0)[slice(*bounds)])) if known else node.name(f"cut {axis}")
    return [resized(value, sizes)]


def concat(node: GraphNode) -> list[Value]:
    """Concat, along a dimension other than that of the rows."""
    values = [value for value in node.inputs if value is not None]
    axis = node.whole("axis", 1 if node.opset < 4 else 0)
    if all(value.axis is None for value in values):
        return [_joined_numbers(node, values, axis)]
    first = next(value for value in values if value.axis is not None)
    axis = node.apart(first, axis)
    parts = _parts(values, axis)
    if not parts:
        values = [node.data(index) for index in range(len(values))]
    for value in values:
        if value.axis is None and value.rank == first.rank:
            raise Refusal("concatenates each row with a tensor of a fixed number of rows")
    _same_rows(*values)
    sizes = list(first.sizes)
    lengths = [value.sizes[axis] for value in values]
    numbers = [whole(length) for length in lengths]
    sizes[axis] = node.name("joined") if None in numbers else Size(sum(each or 0 for each in numbers))
    return [replace(plain(first), shape=tuple(sizes), parts=parts)]


def _parts(values: Sequence[Value], axis: int) -> tuple[bool, ...]:
    """The components of concatenated indices that are a row's own index; empty if there are none."""
    if not any(value.is_position for value in values) or axis != values[0].rank - 1:
        return ()
    if any(value.sizes[-1] != ONE or value.parts or value.by_rows or value.by_place for value in values):
        raise Refusal("uses the index of a row in the run as a value")
    return tuple(value.is_position for value in values)


def _joined_numbers(node: GraphNode, values: Sequence[Value], axis: int) -> Value:
    by_rows = any(value.by_rows for value in values)
    if any(value.shape is None for value in values):
        return Value(by_rows=by_rows)
    if values[0].rank == 1:
        numbers = [value.numbers for value in values]
        if all(each is not None for each in numbers):
            joined: list[Number] = [number for each in numbers for number in each or ()]
            return held((Size(len(joined)),), joined, values[0].dtype)
    axis = axis + values[0].rank if axis < 0 else axis
    sizes = list(values[0].sizes)
    lengths = [whole(value.sizes[axis]) for value in values]
    sizes[axis] = node.name("joined") if None in lengths else Size(sum(each or 0 for each in lengths))
    return Value(tuple(sizes), by_rows=by_rows, dtype=values[0].dtype)


def split(node: GraphNode) -> list[Value]:
    """Split, along a dimension other than that of the rows."""
    value = node.input(0)
    axis = node.apart(value, node.whole("axis", 0))
    given = [Size(each) for each in node.ints("split") or []] or node.numbers(1)
    length = whole(value.sizes[axis])
    if value.rank == 1 and value.axis is None and value.numbers is not None and given is None:
        count = -(-len(value.numbers) // node.num_outputs)
        pieces = [value.numbers[start * count : (start + 1) * count] for start in range(node.num_outputs)]
        return [held((Size(len(each)),), each, value.dtype) for each in pieces]
    results = []
    for index in range(node.num_outputs):
        sizes = list(value.sizes)
        if given is not None and index < len(given):
            sizes[axis] = node.size(given[index], f"piece {index}")
        elif length is not None and given is None and length % node.num_outputs == 0:
            sizes[axis] = Size(length // node.num_outputs)
        else:
            sizes[axis] = node.name(f"piece {index}")
        results.append(replace(resized(value, sizes), content=None))
    return results


def compress(node: GraphNode) -> list[Value]:
    """Compress along an axis, by conditions that are the same for all rows."""
    value = node.data(0)
    node.common(1)
    if "axis" not in node.attributes:
        node.before(value, 0)
        return [Value((node.name("kept"),), dtype=value.dtype)]
    axis = node.apart(value, node.whole("axis", 0))
    sizes = list(value.sizes)
    sizes[axis] = node.name("kept")
    return [resized(value, sizes)]


def one_hot(node: GraphNode) -> list[Value]:
    """OneHot: adds a dimension."""
    indices = node.data(0)
    node.common(2)
    depth = (node.numbers(1) or (None,))[0]
    axis = node.whole("axis", -1)
    axis = axis + indices.rank + 1 if axis < 0 else axis
    size = node.name("depth") if depth is None else node.size(depth, "depth")
    if size.num_rows:
        raise Refusal("computes a size from the number of rows")
    sizes = [*indices.sizes[:axis], size, *indices.sizes[axis:]]
    place = indices.axis
    place = place if place is None or place < axis else place + 1
    return [replace(resized(indices, sizes, axis=place), dtype=node.input(2).dtype)]


def reverse_sequence(node: GraphNode) -> list[Value]:
    """ReverseSequence: each row with its own length."""
    value, lengths = node.data(0), node.data(1)
    node.apart(value, node.whole("time_axis", 0))
    if value.axis != node.whole("batch_axis", 1) or lengths.axis != 0 or value.inner != ONE or lengths.inner != ONE:
        raise Refusal("reverses across the rows")
    return [plain(value)]


RULES = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Scatter": scatter,
    "ScatterElements": scatter,
    "ScatterND": scatter_nd,
    "Slice": slice_of,
    "Concat": concat,
    "Split": split,
    "Compress": compress,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
}
