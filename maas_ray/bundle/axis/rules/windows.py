"""Rules for convolutions, pooling and resizing: images are processed separately, rows are in the first dimension."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor

from maas_ray.bundle.axis.nodes import GraphNode, plain, resized
from maas_ray.bundle.axis.sizes import ONE, Size, whole
from maas_ray.bundle.axis.values import Refusal, Value, unsure


def _sides(node: GraphNode, value: Value, kernel: Sequence[int | None] | None) -> list[Size]:
    """Heights and widths after sliding windows; named sizes if unknown."""
    sides = value.sizes[2:]
    count = len(sides)
    strides = node.ints("strides") or [1] * count
    dilations = node.ints("dilations") or [1] * count
    pads = node.ints("pads") or [0] * (2 * count)
    auto = node.text("auto_pad", "NOTSET")
    found = []
    for axis, side in enumerate(sides):
        length, width = whole(side), None if kernel is None else kernel[axis]
        if length is None or width is None:
            found.append(node.name(f"side {axis}"))
            continue
        window = dilations[axis] * (width - 1) + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            found.append(Size(ceil(length / strides[axis])))
            continue
        free = length - window + (0 if auto == "VALID" else pads[axis] + pads[axis + count])
        steps = free / strides[axis]
        if node.whole("ceil_mode", 0):
            places = ceil(steps) + 1
            if (places - 1) * strides[axis] >= length + pads[axis]:
                places -= 1
        else:
            places = floor(steps) + 1
        found.append(Size(max(0, places)))
    return found


def _kernel(node: GraphNode, weights: Value | None) -> Sequence[int | None] | None:
    given = node.ints("kernel_shape")
    if given is not None:
        return list(given)
    return None if weights is None or weights.shape is None else [whole(size) for size in weights.shape[2:]]


def _channels(node: GraphNode, weights: Value) -> Size:
    return node.name("channels") if weights.shape is None else weights.shape[0]


def conv(node: GraphNode) -> list[Value]:
    """Conv."""
    value, weights = node.leading(node.data(0)), node.data(1)
    node.common(*range(1, len(node.inputs)))
    return [resized(value, (value.sizes[0], _channels(node, weights), *_sides(node, value, _kernel(node, weights))))]


def integer_conv(node: GraphNode) -> list[Value]:
    """ConvInteger: as Conv, its zero points after the weights."""
    (result,) = conv(node)
    return [replace(result, dtype=6)]


def quantized_conv(node: GraphNode) -> list[Value]:
    """QLinearConv: as Conv, its weights are the fourth input."""
    value, weights = node.leading(node.data(0)), node.data(3)
    node.common(*range(1, len(node.inputs)))
    return [resized(value, (value.sizes[0], _channels(node, weights), *_sides(node, value, _kernel(node, weights))))]


def fused_conv(node: GraphNode) -> list[Value]:
    """FusedConv of onnxruntime: Conv, a sum with rows of the same shape, and an activation."""
    value, weights = node.leading(node.data(0)), node.data(1)
    node.common(1, 2)
    result = resized(value, (value.sizes[0], _channels(node, weights), *_sides(node, value, _kernel(node, weights))))
    other = node.maybe(3)
    if other is not None and (other.axis, other.inner) != (result.axis, result.inner):
        raise Refusal("combines rows by their index")
    return [result]


def transposed_conv(node: GraphNode) -> list[Value]:
    """ConvTranspose."""
    value, weights = node.leading(node.data(0)), node.data(1)
    node.common(*range(1, len(node.inputs)))
    per_group = None if weights.shape is None else whole(weights.shape[1])
    channels = node.name("channels") if per_group is None else Size(per_group * node.whole("group", 1))
    shape = node.ints("output_shape")
    sides = [
        node.name(f"side {axis}") if not shape else Size(shape[axis - 2 - value.rank + 2])
        for axis in range(2, value.rank)
    ]
    return [resized(value, (value.sizes[0], channels, *sides))]


def pool(node: GraphNode) -> list[Value]:
    """MaxPool, AveragePool and LpPool; MaxPool's indices are counted over the whole batch."""
    value = node.leading(node.data(0))
    found = resized(value, (*value.sizes[:2], *_sides(node, value, _kernel(node, None))))
    if node.num_outputs > 1:
        raise Refusal("returns indices of elements, counted over all rows")
    return [found]


def global_pool(node: GraphNode) -> list[Value]:
    """Global*Pool."""
    value = node.leading(node.data(0))
    return [resized(value, (*value.sizes[:2], *[ONE] * (value.rank - 2)))]


def deform_conv(node: GraphNode) -> list[Value]:
    """DeformConv: each row has its own offsets."""
    value, offset, mask = node.leading(node.data(0)), node.leading(node.data(2)), node.maybe(4)
    node.common(1, 3)
    for each in (offset, mask):
        if each is not None and (each.axis, each.inner, each.sizes[0]) != (value.axis, value.inner, value.sizes[0]):
            raise Refusal("combines rows by their index")
    return [resized(value, (value.sizes[0], _channels(node, node.input(1)), *offset.sizes[2:]))]


def grid_sample(node: GraphNode) -> list[Value]:
    """GridSample: each image with its own grid."""
    value, grid = node.leading(node.data(0)), node.leading(node.data(1))
    if (value.axis, value.inner, value.sizes[0]) != (grid.axis, grid.inner, grid.sizes[0]):
        raise Refusal("combines rows by their index")
    return [resized(value, (*value.sizes[:2], *grid.sizes[1:-1]))]


def affine_grid(node: GraphNode) -> list[Value]:
    """AffineGrid: one grid per row."""
    theta, numbers = node.leading(node.data(0)), node.numbers(1)
    if numbers is None:
        raise unsure("computes its size at run time")
    sizes = [node.size(number, f"size {axis}") for axis, number in enumerate(numbers)]
    if sizes[0] != theta.sizes[0]:
        raise Refusal("combines rows by their index")
    return [resized(theta, (sizes[0], *sizes[2:], Size(len(sizes) - 2)))]


def columns(node: GraphNode) -> list[Value]:
    """Col2Im."""
    value = node.leading(node.data(0))
    node.common(1, 2)
    sides = node.numbers(1)
    if sides is None:
        raise unsure("computes its size at run time")
    return [
        resized(
            value, (value.sizes[0], node.name("channels"), *(node.size(n, f"side {i}") for i, n in enumerate(sides)))
        )
    ]


def resize(node: GraphNode) -> list[Value]:
    """Resize and Upsample: the number of rows must not change."""
    value = node.data(0)
    axes = node.ints("axes") or list(range(value.rank))
    axes = [axis + value.rank if axis < 0 else axis for axis in axes]
    if node.text("coordinate_transformation_mode") == "tf_crop_and_resize" and value.axis in axes:
        raise unsure("crops by a region that may cut the rows")
    if node.text("keep_aspect_ratio_policy", "stretch") != "stretch" and value.axis in axes:
        raise unsure("scales all dimensions equally")
    is_new = node.op == "Resize" and node.opset >= 11
    scales = node.attributes.get("scales") or node.numbers(2 if is_new else 1) or ()
    wanted = (node.numbers(3) or ()) if is_new else ()
    sizes = list(value.sizes)
    given = wanted or scales
    if not given:
        raise unsure("computes its scales at run time")
    for place, axis in enumerate(axes):
        number = given[place]
        if wanted:
            size = node.size(number, f"side {axis}")
            is_same = size == sizes[axis]
        else:
            is_same = number in (1, 1.0, ONE)
            length = whole(sizes[axis])
            factor = float(number) if isinstance(number, float | int) else whole(number)
            size = node.name(f"side {axis}") if length is None or factor is None else Size(floor(length * factor))
        if not is_same:
            node.apart(value, axis)
            sizes[axis] = size
    return [plain(resized(value, sizes))]


RULES = {
    "Conv": conv,
    "ConvInteger": integer_conv,
    "QLinearConv": quantized_conv,
    "FusedConv": fused_conv,
    "ConvTranspose": transposed_conv,
    "DeformConv": deform_conv,
    **dict.fromkeys(["MaxPool", "AveragePool", "LpPool"], pool),
    **dict.fromkeys(["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"], global_pool),
    "GridSample": grid_sample,
    "AffineGrid": affine_grid,
    "Col2Im": columns,
    "Resize": resize,
    "Upsample": resize,
}
