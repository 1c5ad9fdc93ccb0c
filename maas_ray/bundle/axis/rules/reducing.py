"""Rules for operators that work along dimensions: reductions, softmax, sorting, sums and norms."""

from maas_ray.bundle.axis.nodes import GraphNode, Rule, plain, resized, typed
from maas_ray.bundle.axis.sizes import ONE, Size, product, unknown
from maas_ray.bundle.axis.values import Refusal, Value, held, unsure

_INT64 = 7
REDUCTIONS = [
    f"Reduce{name}" for name in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
]


def reduce(node: GraphNode) -> list[Value]:
    """Reduce*: over all dimensions if no axes are given."""
    value = node.input(0)
    if value.axis is None and value.rank == 1 and value.numbers is not None:
        numbers = value.numbers
        sizes = [number for number in numbers if isinstance(number, Size)]
        total = product(sizes) if node.op == "ReduceProd" and len(sizes) == len(numbers) else unknown(*numbers)
        return [held((ONE,) if node.whole("keepdims", 1) else (), (total,), value.dtype)]
    value = node.data(0)
    axes = node.ints("axes") if "axes" in node.attributes else node.known(1)
    if not axes and node.whole("noop_with_empty_axes", 0):
        return [plain(value)]
    reduced = {node.apart(value, axis) for axis in axes or range(value.rank)}
    place = value.axis
    if node.whole("keepdims", 1):
        sizes = [ONE if axis in reduced else size for axis, size in enumerate(value.sizes)]
    else:
        sizes = [size for axis, size in enumerate(value.sizes) if axis not in reduced]
        place = None if place is None else place - sum(axis < place for axis in reduced)
    return [resized(value, sizes, axis=place)]


def arg(node: GraphNode) -> list[Value]:
    """ArgMax and ArgMin."""
    value = node.data(0)
    axis = node.apart(value, node.whole("axis", 0))
    keeps, place = node.whole("keepdims", 1), value.axis
    sizes = [ONE if each == axis else size for each, size in enumerate(value.sizes) if keeps or each != axis]
    if place is not None and not keeps and place > axis:
        place -= 1
    return [typed(resized(value, sizes, axis=place), _INT64)]


def softmax(node: GraphNode) -> list[Value]:
    """Softmax, LogSoftmax and Hardmax; before operator set 13 over all dimensions from the axis on."""
    value = node.data(0)
    if node.opset < 13:
        node.before(value, node.whole("axis", 1))
    else:
        node.apart(value, node.whole("axis", -1))
    return [plain(value)]


def along(default: int) -> Rule:
    """The rule for operators that keep the shape and work along the attribute `axis`."""

    def rule(node: GraphNode) -> list[Value]:
        value = node.data(0)
        node.apart(value, node.whole("axis", default))
        return [plain(value)]

    return rule


def running(node: GraphNode) -> list[Value]:
    """CumSum and CumProd, whose axis is an input."""
    value = node.data(0)
    axes = node.known(1)
    if not axes:
        raise unsure("computes its axis at run time")
    node.apart(value, axes[0])
    return [plain(value)]


def top_k(node: GraphNode) -> list[Value]:
    """TopK."""
    value = node.data(0)
    axis = node.apart(value, node.whole("axis", -1))
    numbers = node.numbers(1) if node.opset >= 10 else (Size(node.whole("k", 1)),)
    size = node.name("k") if not numbers else node.size(numbers[0], "k")
    if size.num_rows:
        raise Refusal("computes a size from the number of rows")
    sizes = list(value.sizes)
    sizes[axis] = size
    found = resized(value, sizes)
    return [found, typed(found, _INT64)]


def layer_norm(node: GraphNode) -> list[Value]:
    """LayerNormalization and RMSNormalization, from an axis on."""
    value = node.data(0)
    axis = node.before(value, node.whole("axis", -1))
    node.common(1, 2)
    result = node.broadcast(value, *(each for each in node.inputs[1:3] if each is not None))
    mean = resized(value, [*value.sizes[:axis], *[ONE] * (value.rank - axis)])
    return [typed(result, value.dtype), mean, mean]


def batch_norm(node: GraphNode) -> list[Value]:
    """BatchNormalization with fixed statistics."""
    value = node.leading(node.data(0))
    if node.whole("training_mode", 0) or (node.opset < 14 and node.num_outputs > 1):
        raise unsure("computes the mean of the whole batch, as in training")
    node.common(1, 2, 3, 4)
    return [plain(value)]


def per_image(node: GraphNode) -> list[Value]:
    """Operators that normalize each row by itself or by fixed numbers: rows first, then channels."""
    value = node.leading(node.data(0))
    node.common(*range(1, len(node.inputs)))
    return [plain(value)]


def mean_variance(node: GraphNode) -> list[Value]:
    """MeanVarianceNormalization: by default over the batch too."""
    value = node.data(0)
    for axis in node.ints("axes") or [0, 2, 3]:
        node.apart(value, axis)
    return [plain(value)]


def det(node: GraphNode) -> list[Value]:
    """Det: of each matrix."""
    value = node.data(0)
    node.before(value, value.rank - 2)
    return [resized(value, value.sizes[:-2])]


def loss(node: GraphNode) -> list[Value]:
    """NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss, one loss per row."""
    scores, labels = node.leading(node.data(0)), node.leading(node.data(1))
    node.common(2)
    if node.text("reduction", "mean") != "none":
        raise Refusal("computes the mean or the sum over the rows")
    if scores.sizes[0] != labels.sizes[0]:
        raise unsure("compares rows with a tensor that is equal for all rows")
    return [typed(plain(labels), scores.dtype), plain(scores)]


def fourier(node: GraphNode) -> list[Value]:
    """DFT, of each row."""
    value = node.data(0)
    node.common(1, 2)
    axes = node.known(2) if node.opset >= 20 else [node.whole("axis", 1)]
    axis = node.apart(value, axes[0] if axes else -2)
    node.apart(value, value.rank - 1)
    sizes = list(value.sizes)
    sizes[axis] = node.name("frequencies")
    sizes[-1] = node.name("parts")
    return [resized(value, sizes)]


def short_fourier(node: GraphNode) -> list[Value]:
    """STFT, of each row."""
    value = node.leading(node.data(0))
    node.common(1, 2, 3)
    names = [node.name(key) for key in ("frames", "frequencies")]
    return [resized(value, (value.sizes[0], *names, Size(2)))]


RULES = {
    **dict.fromkeys(REDUCTIONS, reduce),
    "ArgMax": arg,
    "ArgMin": arg,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Hardmax": softmax,
    "LpNormalization": along(-1),
    "CumSum": running,
    "CumProd": running,
    "TopK": top_k,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "SimplifiedLayerNormalization": layer_norm,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": per_image,
    "GroupNormalization": per_image,
    "LRN": per_image,
    "MeanVarianceNormalization": mean_variance,
    "Det": det,
    "NegativeLogLikelihoodLoss": loss,
    "SoftmaxCrossEntropyLoss": loss,
    "DFT": fourier,
    "STFT": short_fourier,
}
