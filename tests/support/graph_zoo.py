"""Graphs that mix their rows along the first axis, and graphs that do not, over datatypes and ranks.

Each builder gives the nodes from `x`, of a datatype and a shape `[batch, ...]`, to `y`; what does not exist for a
datatype or a rank is left out by `build`, which asks onnxruntime.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper

from maas_ray.bundle.datatypes import ONNX, Array
from maas_ray.bundle.format import Bundle, BundleInfo, Lineage
from maas_ray.bundle.graph.checks import signature_of

N = helper.make_node
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
NUMBERS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32)
SHAPES: tuple[tuple[int, ...], ...] = ((), (4,), (3, 4), (2, 4, 4))
"""Sizes of one row."""


class Graph:
    """Nodes and constants on the way from `x` to `y`."""

    def __init__(self, dtype: int, row: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.row = row
        self.rank = 1 + len(row)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    @property
    def kind(self) -> np.dtype[np.generic]:
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.dtype))

    def const(self, value: object, *, own: bool = False) -> str:
        """A constant of int64, or of the datatype of `x`."""
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, self.kind if own else np.int64)
        return name

    def add(self, op: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: object) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(N(op, list(inputs), [out], domain=domain, **attributes))
        return out

    def weights(self, *shape: int) -> str:
        random = np.random.default_rng(len(self.nodes) + sum(shape))
        name = f"c{len(self.constants)}"
        values = random.integers(1, 5, shape) if self.kind.kind in "iu" else random.standard_normal(shape)
        self.constants[name] = values.astype(self.kind)
        return name


Builder = Callable[[Graph], str]
"""Adds the nodes; returns the name of what `y` is."""


def _reduce(op: str) -> Builder:
    return lambda g: g.add("Sub", "x", g.add(op, "x", g.const([0]), keepdims=1))


def _reduce_all(op: str) -> Builder:
    return lambda g: g.add("Add", "x", g.add(op, "x", keepdims=0))


def _cumsum(**attributes: int) -> Builder:
    return lambda g: g.add("CumSum", "x", g.const(0), **attributes)


def _softmax(op: str) -> Builder:
    return lambda g: g.add(op, "x", axis=0)


def _sorted(g: Graph) -> str:
    count = g.add("Shape", "x", start=0, end=1)
    g.nodes.append(N("TopK", ["x", count], ["top", "places"], axis=0))
    return "top"


def _reversed(g: Graph) -> str:
    return g.add("Slice", "x", g.const([-1]), g.const([-(1 << 60)]), g.const([0]), g.const([-1]))


def _rolled(g: Graph) -> str:
    last = g.add("Slice", "x", g.const([-1]), g.const([1 << 60]), g.const([0]))
    rest = g.add("Slice", "x", g.const([0]), g.const([-1]), g.const([0]))
    return g.add("Concat", last, rest, axis=0)


def _less_the_first(g: Graph) -> str:
    return g.add("Sub", "x", g.add("Gather", "x", g.const([0]), axis=0))


def _less_the_last(g: Graph) -> str:
    return g.add("Sub", "x", g.add("Slice", "x", g.const([-1]), g.const([1 << 60]), g.const([0])))


def _by_count(g: Graph) -> str:
    count = g.add("Cast", g.add("Shape", "x", start=0, end=1), to=g.dtype)
    return g.add("Mul", "x", count)


def _by_size(g: Graph) -> str:
    return g.add("Add", "x", g.add("Cast", g.add("Size", "x"), to=g.dtype))


def _by_place(g: Graph) -> str:
    count = g.add("Squeeze", g.add("Shape", "x", start=0, end=1))
    places = g.add("Cast", g.add("Range", g.const(0), count, g.const(1)), to=g.dtype)
    return g.add("Add", "x", g.add("Reshape", places, g.const([-1, *[1] * len(g.row)])))


def _gram(g: Graph) -> str:
    flat = g.add("Flatten", "x", axis=1)
    products = g.add("MatMul", flat, g.add("Transpose", flat, perm=[1, 0]))
    return g.add("Sub", "x", _as_row(g, g.add("ReduceMax", products, g.const([1]), keepdims=0)))


def _as_row(g: Graph, vector: str) -> str:
    return g.add("Reshape", vector, g.const([-1, *[1] * len(g.row)]))


def _attention(g: Graph) -> str:
    flat = g.add("Flatten", "x", axis=1)
    scores = g.add("Softmax", g.add("MatMul", flat, g.add("Transpose", flat, perm=[1, 0])), axis=-1)
    return g.add("MatMul", scores, flat)


def _turned(g: Graph) -> str:
    flat = g.add("Flatten", "x", axis=1)
    turned = g.add("Transpose", flat, perm=[1, 0])
    return g.add("Transpose", g.add("CumSum", turned, g.const(1)), perm=[1, 0])


def _recut(g: Graph) -> str:
    pairs = g.add("Reshape", "x", g.const([1, -1]))
    less = g.add("Sub", pairs, g.add("ReduceMean", pairs, g.const([1]), keepdims=1))
    return g.add("Reshape", less, g.add("Shape", "x"))


def _normalized(op: str) -> Builder:
    def build(g: Graph) -> str:
        turned = g.add("Transpose", g.add("Flatten", "x", axis=1), perm=[1, 0])
        return g.add("Transpose", g.add(op, turned, axis=1), perm=[1, 0])

    return build


def _lp(g: Graph) -> str:
    return g.add("LpNormalization", "x", axis=0, p=2)


def _mean_variance(g: Graph) -> str:
    return g.add("MeanVarianceNormalization", "x", axes=[0])


def _quantized_by_range(g: Graph) -> str:
    g.nodes.append(N("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]))
    return g.add("DequantizeLinear", "q", "scale", "zero")


def _unique(g: Graph) -> str:
    flat = g.add("ReduceMax", g.add("Flatten", "x", axis=1), g.const([1]), keepdims=0)
    g.nodes.append(N("Unique", [flat], ["u", "first", "inverse", "counts"], sorted=1))
    return _as_row(g, "inverse")


def _arg(op: str) -> Builder:
    return lambda g: g.add("Sub", "x", g.add("Cast", g.add(op, "x", axis=0, keepdims=1), to=g.dtype))


def _scanned(g: Graph) -> str:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [N("Add", ["sum", "row"], ["next"]), N("Identity", ["next"], ["out"])],
        "body",
        [value("sum", g.dtype, g.row), value("row", g.dtype, g.row)],
        [value("next", g.dtype, g.row), value("out", g.dtype, g.row)],
    )
    start = g.const(np.zeros(g.row), own=True)
    g.nodes.append(N("Scan", [start, "x"], ["final", "sums"], body=body, num_scan_inputs=1))
    return "sums"


def _if_many(g: Graph) -> str:
    value = helper.make_tensor_value_info
    count = g.add("Squeeze", g.add("Shape", "x", start=0, end=1))
    is_many = g.add("Greater", count, g.const(1))
    branches = [
        helper.make_graph([N(op, ["x"], [f"{op}_out"])], op, [], [value(f"{op}_out", g.dtype, None)])
        for op in ("Neg", "Identity")
    ]
    return g.add("If", is_many, then_branch=branches[0], else_branch=branches[1])


def _looped(g: Graph) -> str:
    value = helper.make_tensor_value_info
    count = g.add("Squeeze", g.add("Shape", "x", start=0, end=1))
    body = helper.make_graph(
        [N("Add", ["carried", "x"], ["next"]), N("Identity", ["goes_in"], ["goes_on"])],
        "body",
        [value("i", 7, []), value("goes_in", 9, []), value("carried", g.dtype, None)],
        [value("goes_on", 9, []), value("next", g.dtype, None)],
    )
    return g.add("Loop", count, "", "x", body=body)


def _nonzero(g: Graph) -> str:
    vector = g.add("ReduceMax", g.add("Flatten", "x", axis=1), g.const([1]), keepdims=0)
    found = g.add("NonZero", vector)
    return g.add("Add", "x", g.add("Cast", g.add("ReduceSum", found, keepdims=0), to=g.dtype))


def _scattered(g: Graph) -> str:
    first = g.add("Gather", "x", g.const([0]), axis=0)
    return g.add("ScatterND", "x", g.const([[0]]), g.add("Neg", first))


def _einsum(g: Graph) -> str:
    flat = g.add("Flatten", "x", axis=1)
    return g.add("Einsum", flat, flat, flat, equation="bi,ci,cj->bj")


def _layer_norm_of_all(g: Graph) -> str:
    return g.add("Add", "x", g.add("ReduceLogSumExp", "x", keepdims=1))


def _maximum_place(g: Graph) -> str:
    g.nodes.append(N("MaxPool", ["x"], ["pooled", "places"], kernel_shape=[2] * (g.rank - 2)))
    return "places"


def _rows_as_features(g: Graph) -> str:
    turned = g.add("Transpose", g.add("Flatten", "x", axis=1), perm=[1, 0])
    less = g.add("Sub", turned, g.add("ReduceMean", turned, g.const([1]), keepdims=1))
    return g.add("Transpose", less, perm=[1, 0])


def _rows_as_sequence(op: str) -> Builder:
    def build(g: Graph) -> str:
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
        width = int(np.prod(g.row, dtype=int))
        sequence = g.add("Unsqueeze", g.add("Flatten", "x", axis=1), g.const([1]))
        out = g.add(op, sequence, g.weights(1, gates * 4, width), g.weights(1, gates * 4, 4), hidden_size=4)
        return g.add("Squeeze", out, g.const([1, 2]))

    return build


def _pooled_over_rows(g: Graph) -> str:
    turned = g.add("Unsqueeze", g.add("Transpose", g.add("Flatten", "x", axis=1), perm=[1, 0]), g.const([0]))
    pooled = g.add("MaxPool", turned, kernel_shape=[3], pads=[1, 1])
    return g.add("Transpose", g.add("Squeeze", pooled, g.const([0])), perm=[1, 0])


def _convolved_over_rows(g: Graph) -> str:
    turned = g.add("Unsqueeze", g.add("Transpose", g.add("Flatten", "x", axis=1), perm=[1, 0]), g.const([0]))
    width = int(np.prod(g.row, dtype=int))
    out = g.add("Conv", turned, g.weights(2, width, 3), kernel_shape=[3], pads=[1, 1])
    return g.add("Transpose", g.add("Squeeze", out, g.const([0])), perm=[1, 0])


def _padded(g: Graph) -> str:
    pads = g.const([1, *[0] * len(g.row), 0, *[0] * len(g.row)])
    padded = g.add("Pad", "x", pads, mode="edge")
    return g.add("Sub", "x", g.add("Slice", padded, g.const([0]), g.const([-1]), g.const([0])))


def _at_a_value(g: Graph) -> str:
    """Mixes only where an element is 777, which no probe draws."""
    return g.add("Where", g.add("Equal", "x", g.const(777, own=True)), g.add("CumSum", "x", g.const(0)), "x")


def _beyond_a_count(g: Graph) -> str:
    """Mixes only in runs of more than 9 rows."""
    count = g.add("Squeeze", g.add("Shape", "x", start=0, end=1))
    extra = g.add("Max", g.add("Sub", count, g.const(9)), g.const(0))
    return g.add("Add", "x", g.add("Cast", extra, to=g.dtype))


def _of_equal_rows(g: Graph) -> str:
    """Counts rows that are equal to one value, which no probe draws."""
    hits = g.add("Cast", g.add("Equal", "x", g.const(777, own=True)), to=g.dtype)
    return g.add("Add", "x", g.add("ReduceSum", hits, g.const([0]), keepdims=1))


def _hidden_max(g: Graph) -> str:
    """The largest of those elements of all rows that are 777, which no probe draws."""
    hits = g.add("Where", g.add("Equal", "x", g.const(777, own=True)), "x", g.const(0, own=True))
    return g.add("Add", "x", g.add("ReduceMax", hits, g.const([0]), keepdims=1))


MIXING: dict[str, Builder] = {
    **{f"less {op}": _reduce(op) for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")},
    **{f"plus {op} of all": _reduce_all(op) for op in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean")},
    "running sum": _cumsum(), "running sum from behind": _cumsum(reverse=1), "running sum before": _cumsum(exclusive=1),
    **{f"{op} over rows": _softmax(op) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    "sorted": _sorted, "reversed": _reversed, "rolled": _rolled,
    "less the first": _less_the_first, "less the last": _less_the_last, "times the count": _by_count,
    "plus the size": _by_size, "plus the place": _by_place, "products of rows": _gram, "attention": _attention,
    "turned running sum": _turned, "recut": _recut, "softmax of columns": _normalized("Softmax"),
    "norm of columns": _normalized("LpNormalization"), "norm over rows": _lp, "variance over rows": _mean_variance,
    "quantized by range": _quantized_by_range, "unique": _unique,
    **{f"less {op}": _arg(op) for op in ("ArgMax", "ArgMin")},
    "scanned": _scanned, "if many": _if_many, "looped by count": _looped, "nonzero": _nonzero,
    "scattered": _scattered, "einsum": _einsum, "log of all": _layer_norm_of_all, "places of maxima": _maximum_place,
    "columns less their mean": _rows_as_features, **{f"{op} along rows": _rows_as_sequence(op) for op in ("RNN", "GRU", "LSTM")},
    "pooled over rows": _pooled_over_rows, "convolved over rows": _convolved_over_rows, "padded": _padded,
    "mixed at a value": _at_a_value, "mixed beyond a count": _beyond_a_count,
    "count of a value": _of_equal_rows, "largest of a value": _hidden_max,
}  # fmt: skip


class DoesNotExist(Exception):
    """A kind has no form in a rank."""


def _of(rank: int, builder: Builder) -> Builder:
    """A kind that needs that many dimensions besides the rows."""

    def checked(g: Graph) -> str:
        if len(g.row) < rank:
            raise DoesNotExist(f"{g.row} has fewer than {rank} dimensions")
        return builder(g)

    return checked


def _one(op: str, **attributes: object) -> Builder:
    return lambda g: g.add(op, "x", **attributes)


def _with_weights(op: str) -> Builder:
    return lambda g: g.add(op, "x", g.weights(*g.row))


def _reduced(op: str, *, keeps: int) -> Builder:
    return _of(1, lambda g: g.add(op, "x", g.const([g.rank - 1]), keepdims=keeps))


def _last(op: str, **attributes: object) -> Builder:
    return _of(1, lambda g: g.add(op, "x", axis=g.rank - 1, **attributes))


def _linear(g: Graph) -> str:
    return g.add("MatMul", "x", g.weights(g.row[-1], 5))


def _gemm(g: Graph) -> str:
    flat = g.add("Flatten", "x", axis=1)
    return g.add("Gemm", flat, g.weights(5, int(np.prod(g.row, dtype=int))), g.weights(5), transB=1)


def _two_layers(g: Graph) -> str:
    return g.add("MatMul", g.add("Relu", _linear(g)), g.weights(5, 3))


def _reshaped(g: Graph) -> str:
    shape = g.add("Shape", "x")
    rows = g.add("Gather", shape, g.const([0]), axis=0)
    target = g.add("Concat", rows, g.const([-1]), axis=0)
    return g.add("MatMul", g.add("Reshape", "x", target), g.weights(int(np.prod(g.row, dtype=int)), 2))


def _zero_copies(g: Graph) -> str:
    return g.add("Reshape", "x", g.const([0, -1]))


def _there_and_back(g: Graph) -> str:
    turned = g.add("Transpose", "x", perm=list(reversed(range(g.rank))))
    return g.add("Transpose", g.add("Neg", turned), perm=list(reversed(range(g.rank))))


def _folded(g: Graph) -> str:
    """Rows and the next dimension in one, and apart again, as heads of attention are."""
    folded = g.add("Reshape", "x", g.const([-1, *g.row[1:]]))
    return g.add("Reshape", g.add("Softmax", folded, axis=-1), g.add("Shape", "x"))


def _self_attention(g: Graph) -> str:
    query, key, value = (g.add("MatMul", "x", g.weights(g.row[-1], 4)) for _ in range(3))
    axes = [*range(g.rank - 2), g.rank - 1, g.rank - 2]
    scores = g.add("MatMul", query, g.add("Transpose", key, perm=axes))
    return g.add("MatMul", g.add("Softmax", scores, axis=-1), value)


def _layer_norm(g: Graph) -> str:
    return g.add("LayerNormalization", "x", g.weights(g.row[-1]), g.weights(g.row[-1]), axis=-1)


def _batch_norm(g: Graph) -> str:
    names = [g.weights(g.row[0]) for _ in range(3)]
    variance = g.const(np.full(g.row[0], 2.0), own=True)
    return g.add("BatchNormalization", "x", *names, variance)


def _conv(g: Graph) -> str:
    out = g.add("Conv", "x", g.weights(3, g.row[0], *[1] * (g.rank - 2)))
    return g.add("Flatten", out, axis=1)


def _pooled(op: str) -> Builder:
    return lambda g: g.add(op, "x", kernel_shape=[2] * (g.rank - 2))


def _cut(g: Graph) -> str:
    return g.add("Slice", "x", g.const([1]), g.const([1 << 60]), g.const([g.rank - 1]))


def _all_rows_cut(g: Graph) -> str:
    return g.add("Slice", "x", g.const([0]), g.const([(1 << 63) - 1]), g.const([0]))


def _joined(g: Graph) -> str:
    return g.add("Concat", "x", g.add("Neg", "x"), axis=g.rank - 1)


def _beginning_token(g: Graph) -> str:
    """A vector before each sequence, repeated for each row as exporters do."""
    rows = g.add("Shape", "x", start=0, end=1)
    target = g.add("Concat", rows, g.const([1, *g.row[1:]]), axis=0)
    return g.add("Concat", g.add("Expand", g.weights(1, 1, *g.row[1:]), target), "x", axis=1)


def _split(g: Graph) -> str:
    g.nodes.append(N("Split", ["x", g.const([1, g.row[-1] - 1])], ["left", "right"], axis=g.rank - 1))
    return g.add("Mul", "left", "right")


def _gathered(g: Graph) -> str:
    return g.add("Gather", "x", g.const([1, 0]), axis=g.rank - 1)


def _embedded(g: Graph) -> str:
    index = g.add("Cast", g.add("Mod", g.add("Abs", g.add("Cast", "x", to=7)), g.const(7)), to=7)
    return g.add("Gather", g.weights(7, 3), index, axis=0)


def _top(g: Graph) -> str:
    g.nodes.append(N("TopK", ["x", g.const([2])], ["top", "places"], axis=g.rank - 1))
    return g.add("Add", "top", g.add("Cast", "places", to=g.dtype))


def _along(g: Graph) -> str:
    return g.add("CumSum", "x", g.const(g.rank - 1))


def _where(g: Graph) -> str:
    return g.add("Where", g.add("Greater", "x", g.const(0, own=True)), "x", g.add("Neg", "x"))


def _hot(g: Graph) -> str:
    index = g.add("Mod", g.add("Abs", g.add("Cast", "x", to=7)), g.const(5))
    return g.add("OneHot", index, g.const(5), g.const([0, 1], own=True))


def _sequence(op: str) -> Builder:
    def build(g: Graph) -> str:
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
        turned = g.add("Transpose", "x", perm=[1, 0, 2])
        g.nodes.append(
            N(
                op,
                [turned, g.weights(1, gates * 4, g.row[1]), g.weights(1, gates * 4, 4)],
                ["all", "last"],
                hidden_size=4,
            )
        )
        return g.add("Squeeze", "last", g.const([0]))

    return build


def _looped_often(g: Graph) -> str:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [N("Add", ["carried", "x"], ["next"]), N("Identity", ["goes_in"], ["goes_on"])],
        "body",
        [value("i", 7, []), value("goes_in", 9, []), value("carried", g.dtype, None)],
        [value("goes_on", 9, []), value("next", g.dtype, None)],
    )
    return g.add("Loop", g.const(3), "", "x", body=body)


def _scanned_along(g: Graph) -> str:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [N("Add", ["sum", "column"], ["next"]), N("Identity", ["next"], ["out"])],
        "body",
        [value("sum", g.dtype, None), value("column", g.dtype, None)],
        [value("next", g.dtype, None), value("out", g.dtype, None)],
    )
    start = g.add("Squeeze", g.add("Slice", "x", g.const([0]), g.const([1]), g.const([1])), g.const([1]))
    g.nodes.append(
        N(
            "Scan",
            [start, "x"],
            ["final", "sums"],
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[1],
            scan_output_axes=[1],
        )
    )
    return "sums"


def _own_vectors(g: Graph) -> str:
    """The vector at each row's own place of a sequence, by numbers of rows, as text classifiers take the last word."""
    count = g.add("Squeeze", g.add("Shape", "x", start=0, end=1))
    rows = g.add("Unsqueeze", g.add("Range", g.const(0), count, g.const(1)), g.const([1]))
    sums = g.add("ReduceMax", "x", g.const([2]), keepdims=0)
    places = g.add("ArgMax", sums, axis=1, keepdims=1)
    return g.add("GatherND", "x", g.add("Concat", rows, places, axis=1))


def _tiled(g: Graph) -> str:
    return g.add("Tile", "x", g.const([1, *[2] * len(g.row)]))


def _padded_sides(g: Graph) -> str:
    return g.add("Pad", "x", g.const([0, *[1] * len(g.row), 0, *[0] * len(g.row)]))


def _einsum_apart(g: Graph) -> str:
    flat = g.add("Flatten", "x", axis=1)
    return g.add("Einsum", flat, g.weights(int(np.prod(g.row, dtype=int)), 3), equation="bi,ij->bj")


def _scaled(g: Graph) -> str:
    return g.add("Mul", g.add("Sub", "x", g.const(2, own=True)), g.const(3, own=True))


def _quantized(g: Graph) -> str:
    scale = np.float32(0.05)
    g.constants["scale"], g.constants["zero"] = np.asarray(scale), np.asarray(3, np.uint8)
    return g.add("DequantizeLinear", g.add("QuantizeLinear", "x", "scale", "zero"), "scale", "zero")


def _resized(g: Graph) -> str:
    g.constants["scales"] = np.float32([1, 1, *[2] * (g.rank - 2)])
    return g.add("Resize", "x", "", "scales", mode="nearest")


HARMLESS: dict[str, Builder] = {
    **{op.lower(): _one(op) for op in ("Identity", "Neg", "Abs", "Relu", "Tanh", "Sigmoid", "Exp", "Sign", "Floor", "Erf", "LeakyRelu", "Softplus")},
    **{f"{op.lower()} a constant": _with_weights(op) for op in ("Add", "Sub", "Mul", "Max", "Min", "Greater", "PRelu")},
    **{f"{op} of each": _reduced(op, keeps=1) for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2")},
    **{f"{op} of each, gone": _reduced(op, keeps=0) for op in ("ReduceMean", "ReduceMin")},
    **{f"{op} of each": _last(op) for op in ("Softmax", "LogSoftmax", "ArgMax", "ArgMin", "Hardmax")},
    "norm of each": _last("LpNormalization", p=2), "linear": _linear, "gemm": _gemm, "two layers": _two_layers,
    "reshaped by its shape": _reshaped, "zero copies": _zero_copies, "there and back": _there_and_back,
    "folded": _of(2, _folded), "self-attention": _of(2, _self_attention), "layer norm": _layer_norm, "batch norm": _batch_norm,
    "convolution": _conv, "max pool": _pooled("MaxPool"), "average pool": _pooled("AveragePool"),
    "global pool": _one("GlobalAveragePool"), "flatten": _one("Flatten", axis=1), "cut": _of(1, _cut), "all rows cut": _all_rows_cut,
    "joined": _of(1, _joined), "first token": _beginning_token, "split": _split, "gathered": _gathered, "embedded": _embedded,
    "top": _top, "running sum of each": _of(1, _along), "where": _where, "one hot": _hot,
    **{f"{op} of each": _sequence(op) for op in ("RNN", "GRU", "LSTM")},
    "looped often": _looped_often, "scanned along": _scanned_along, "own vectors": _own_vectors, "tiled": _tiled,
    "padded sides": _padded_sides, "einsum apart": _einsum_apart, "scaled": _scaled, "quantized": _quantized,
    "resized": _resized,
}  # fmt: skip


@dataclass(frozen=True)
class Specimen:
    """A graph of the zoo."""

    kind: str
    dtype: int
    row: tuple[int, ...]
    bundle: Bundle

    @property
    def name(self) -> str:
        return f"{self.kind} {ONNX[self.dtype]} {list(self.row)}"

    def requests(self, count: int, seed: int = 0) -> list[dict[str, Array]]:
        """Requests of one to three rows; some values are larger than any that a probe draws."""
        random = np.random.default_rng(seed)
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(self.dtype))
        found: list[dict[str, Array]] = []
        for number in range(count):
            values = random.integers(1, 1000, (1 + number % 3, *self.row))
            values[random.random(values.shape) < 0.05] = 777
            scale = 1.0 if number % 2 or kind.kind in "iu" else 0.01
            found.append({"x": (values * scale).astype(kind)})
        return found


def build(kind: str, builder: Builder, dtype: int, row: tuple[int, ...]) -> Specimen:
    """One graph; raises whatever the checker or the builder says where the kind does not exist in this form."""
    g = Graph(dtype, row)
    out = builder(g)
    inferred = _typed(g, out)
    graph = helper.make_graph(
        g.nodes, "zoo", [helper.make_tensor_value_info("x", dtype, ["batch", *row])], [inferred],
        [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content = model.SerializeToString()
    lineage = Lineage(run="zoo", step=1, checkpoint_digest="c", data_digest="d", spec_digest="s")
    info = BundleInfo(signature=signature_of(content), task="other", parity={}, metrics={}, lineage=lineage)
    return Specimen(kind, dtype, row, Bundle("zoo", info, content))


def _typed(g: Graph, out: str) -> onnx.ValueInfoProto:
    """The type and rank of an output, by inference; its first size is the batch."""
    x = helper.make_tensor_value_info("x", g.dtype, ["batch", *g.row])
    bare = helper.make_graph(
        g.nodes,
        "zoo",
        [x],
        [onnx.ValueInfoProto(name=out)],
        [numpy_helper.from_array(v, n) for n, v in g.constants.items()],
    )
    model = helper.make_model(bare, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    found = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True).graph.output[0]
    tensor = found.type.tensor_type
    sizes = [dim.dim_value or f"d{axis}" for axis, dim in enumerate(tensor.shape.dim)]
    return helper.make_tensor_value_info(out, tensor.elem_type, ["batch", *sizes[1:]])


def specimens(
    kinds: Mapping[str, Builder],
    dtypes: Sequence[int] = NUMBERS,
    rows: Sequence[tuple[int, ...]] = SHAPES,
    *,
    one_of_each: bool = False,
) -> Iterator[Specimen]:
    """Every kind in every datatype and rank in which it exists, or in the first of them."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for kind, builder in kinds.items():
        for dtype, row in product(dtypes, rows):
            try:
                specimen = build(kind, builder, dtype, row)
                session = ort.InferenceSession(specimen.bundle.graph, options, providers=["CPUExecutionProvider"])
                for request in specimen.requests(3):
                    session.run(None, request)
            except Exception:
                continue
            yield specimen
            if one_of_each:
                break
