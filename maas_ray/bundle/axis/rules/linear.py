"""Rules for matrix products: rows may be in either factor, but not in the dimension of the sum."""

from collections.abc import Sequence
from dataclasses import replace

from maas_ray.bundle.axis.nodes import GraphNode, typed
from maas_ray.bundle.axis.sizes import ONE, Size
from maas_ray.bundle.axis.values import Refusal, Value, unsure

_INT32 = 6
_SUMMED = "sums over the rows"


def product_of(node: GraphNode, first: Value, second: Value) -> Value:
    """A matrix product with NumPy's broadcasting."""
    ranks = first.rank, second.rank
    if min(ranks) == 0:
        raise unsure("multiplies a scalar as a matrix")
    left = first if ranks[0] > 1 else _with_one(first, 0)
    right = second if ranks[1] > 1 else _with_one(second, 1)
    if left.axis == left.rank - 1 or right.axis == right.rank - 2:
        raise Refusal(_SUMMED)
    # The other factor is the same for a whole matrix, so its own dimensions there count as 1.
    frames = [_frame(left, right.rank, is_left=True), _frame(right, left.rank, is_left=False)]
    result = node.broadcast(*frames)
    sizes = [*result.sizes[:-2], left.sizes[-2], right.sizes[-1]]
    axis = result.axis
    for place, rank in ((-1, ranks[1]), (-2, ranks[0])):
        if rank == 1:
            position = len(sizes) + place
            del sizes[position]
            axis = axis - 1 if axis is not None and axis > position else axis
    return Value(tuple(sizes), axis, result.inner, dtype=first.dtype)


def _with_one(value: Value, place: int) -> Value:
    sizes = list(value.sizes)
    sizes.insert(place, ONE)
    axis = value.axis if value.axis is None or value.axis < place else value.axis + 1
    return replace(value, shape=tuple(sizes), axis=axis, content=None)


def _frame(value: Value, other_rank: int, *, is_left: bool) -> Value:
    """A factor with 1 in dimensions whose size in the result comes from the other factor."""
    sizes = list(value.sizes)
    sizes[-1 if is_left else -2] = ONE
    missing = max(0, other_rank - len(sizes))
    axis = None if value.axis is None else value.axis + missing
    return replace(value, shape=(*[ONE] * missing, *sizes), axis=axis, content=None)


def matmul(node: GraphNode) -> list[Value]:
    """MatMul."""
    return [product_of(node, node.data(0), node.data(1))]


def _quantized(node: GraphNode, first: int, *others: int) -> None:
    """Rejects scales and zero points that contain rows, and those with an entry per row of the first factor."""
    node.common(first, *others)
    for index in (first, *others):
        value = node.maybe(index)
        if value is not None and value.shape != () and value.shape != (ONE,) and index == first:
            raise unsure("scales the rows of a factor separately")


def integer_matmul(node: GraphNode) -> list[Value]:
    """MatMulInteger."""
    _quantized(node, 2, 3)
    return [typed(product_of(node, node.data(0), node.data(1)), _INT32)]


def quantized_matmul(node: GraphNode) -> list[Value]:
    """QLinearMatMul."""
    for index in (1, 2):
        _quantized(node, index)
    node.common(4, 5, 6, 7)
    return [product_of(node, node.data(0), node.data(3))]


def _transposed(value: Value, *, is_turned: bool) -> Value:
    if not is_turned:
        return value
    sizes = [*value.sizes[:-2], value.sizes[-1], value.sizes[-2]]
    last = value.rank - 1
    axis = {last: last - 1, last - 1: last}.get(value.axis if value.axis is not None else -1, value.axis)
    return replace(value, shape=tuple(sizes), axis=axis, content=None)


def gemm(node: GraphNode) -> list[Value]:
    """Gemm: A·B + C, each of A and B transposed or not."""
    first = _transposed(node.data(0), is_turned=bool(node.whole("transA", 0)))
    second = _transposed(node.data(1), is_turned=bool(node.whole("transB", 0)))
    if first.rank != 2 or second.rank != 2:
        raise unsure("multiplies tensors that are not matrices")
    result = product_of(node, first, second)
    return [node.broadcast(result, node.data(2)) if node.maybe(2) is not None else result]


def fused_matmul(node: GraphNode) -> list[Value]:
    """FusedMatMul of onnxruntime: MatMul with transposed factors."""
    if node.whole("transBatchA", 0) or node.whole("transBatchB", 0):
        raise unsure("transposes the batch of its factors")
    first = _transposed(node.data(0), is_turned=bool(node.whole("transA", 0)))
    second = _transposed(node.data(1), is_turned=bool(node.whole("transB", 0)))
    return [product_of(node, first, second)]


def einsum(node: GraphNode) -> list[Value]:
    """Einsum: the letter of the rows must be in the result and in no factor that is the same for all rows."""
    values = [node.data(index) for index in range(len(node.inputs))]
    terms, result = _letters(node.text("equation"), values)
    letters = {term[value.axis] for term, value in zip(terms, values, strict=True) if value.axis is not None}
    sizes: dict[str, Size] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size in zip(term, value.sizes, strict=True):
            if sizes.get(letter, ONE) == ONE:
                sizes[letter] = size
    shape = tuple(sizes[letter] for letter in result)
    if not letters:
        return [Value(shape, dtype=values[0].dtype)]
    rows = letters.pop()
    if letters:
        raise Refusal("combines each row with every other: they are in different dimensions of its inputs")
    if rows not in result:
        raise Refusal(_SUMMED)
    inner = {value.inner for value in values if value.axis is not None}
    for term, value in zip(terms, values, strict=True):
        if term.count(rows) > 1 or (value.axis is None and rows in term) or len(inner) > 1:
            raise Refusal("combines rows by their index")
    return [Value(shape, result.index(rows), inner.pop(), dtype=values[0].dtype)]


def _letters(equation: str, values: Sequence[Value]) -> tuple[list[str], str]:
    """The subscripts of the factors and of the result, with an ellipsis replaced by uppercase Greek letters."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(values):
        raise unsure("has an equation with another number of factors")
    widest = 0
    for index, (term, value) in enumerate(zip(terms, values, strict=True)):
        if "..." in term:
            width = value.rank - (len(term) - 3)
            widest = max(widest, width)
            dots = "".join(chr(0x391 + 20 - width + each) for each in range(width))
            terms[index] = term.replace("...", dots)
        if len(terms[index]) != value.rank:
            raise unsure("has an equation whose ranks differ from those of its factors")
    if "->" not in equation:
        letters = "".join(terms)
        right = ("..." if widest else "") + "".join(
            sorted({x for x in letters if x.isascii() and letters.count(x) == 1})
        )
    return terms, right.replace("...", "".join(chr(0x391 + 20 - widest + each) for each in range(widest)))


RULES = {
    "MatMul": matmul,
    "MatMulInteger": integer_matmul,
    "QLinearMatMul": quantized_matmul,
    "Gemm": gemm,
    "FusedMatMul": fused_matmul,
    "FusedGemm": gemm,
    "Einsum": einsum,
}
