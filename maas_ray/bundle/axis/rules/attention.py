"""Rules for attention and embedding operators of the standard and of onnxruntime: rows are in the first dimension."""

from maas_ray.bundle.axis.nodes import GraphNode, plain, resized, typed
from maas_ray.bundle.axis.rules.linear import product_of
from maas_ray.bundle.axis.sizes import BATCH, ONE
from maas_ray.bundle.axis.values import Refusal, Value, unsure


def _first(node: GraphNode, index: int) -> Value:
    """An input with exactly one row per entry of its first dimension."""
    value = node.data(index)
    if value.axis != 0 or value.inner != ONE or value.sizes[0] != BATCH:
        raise unsure(f"has an input ({index}) whose first dimension is not the rows")
    return value


def _given(node: GraphNode, *indices: int) -> None:
    for index in indices:
        if node.maybe(index) is not None:
            _first(node, index)


def _aligned(node: GraphNode, index: int, rank: int) -> None:
    """Checks a mask or bias: the same for all rows, or one per row, aligned with scores of `rank` dimensions."""
    value = node.maybe(index)
    if value is None:
        return
    if value.axis is not None:
        _first(node, index)
        if value.rank != rank:
            raise Refusal("aligns its mask with a dimension other than the rows")
    elif value.by_rows or value.rank > rank or (value.rank == rank and value.sizes[0] != ONE):
        raise Refusal("broadcasts a mask over the rows by their index")


def attention(node: GraphNode) -> list[Value]:
    """Attention of the standard operator set."""
    query, key, value = _first(node, 0), _first(node, 1), _first(node, 2)
    _aligned(node, 3, 4)
    _given(node, 4, 5, 6)
    width = value.sizes[-1] if query.rank == 4 else node.name("width")
    result = resized(query, (*query.sizes[:-1], width))
    caches = [
        resized(key, (BATCH, *[node.name(f"{what} {axis}") for axis in range(3)])) for what in ("key", "value", "score")
    ]
    return [result, *caches]


def rotary(node: GraphNode) -> list[Value]:
    """RotaryEmbedding of the standard: angles by position, or tables per row."""
    value = _first(node, 0)
    if node.maybe(3) is None:
        _given(node, 1, 2)
    else:
        node.common(1, 2)
        _first(node, 3)
    return [plain(value)]


def skip_norm(node: GraphNode) -> list[Value]:
    """SkipLayerNormalization: a sum of rows, normalized by row."""
    value, skip = node.data(0), node.data(1)
    node.common(*range(2, len(node.inputs)))
    result = node.broadcast(value, skip)
    axis = node.before(result, -1)
    mean = resized(result, [*result.sizes[:axis], ONE])
    return [typed(result, value.dtype), mean, mean, result]


def embed_norm(node: GraphNode) -> list[Value]:
    """EmbedLayerNormalization: words, positions and segments to normalized vectors."""
    ids = _first(node, 0)
    _given(node, 1, 7)
    node.common(2, 3, 4, 5, 6)
    if node.maybe(8) is not None:
        raise unsure("takes positions of words as an input, for which there is no rule")
    vectors = resized(ids, (*ids.sizes, node.name("hidden")))
    return [typed(vectors, 1), resized(ids, (BATCH,)), typed(vectors, 1)]


def fused_attention(node: GraphNode) -> list[Value]:
    """Attention of onnxruntime."""
    value = _first(node, 0)
    node.common(1, 2)
    mask = node.maybe(3)
    if mask is not None and (mask.rank < 2 or mask.axis != 0):
        raise unsure("takes a mask whose first dimension is not the rows")
    _given(node, 3)
    if node.maybe(4) is not None:
        raise unsure("has a cache whose rows are in its second dimension")
    _aligned(node, 5, 4)
    if node.num_outputs > 1:
        raise unsure("has a cache whose rows are in its second dimension")
    return [resized(value, (*value.sizes[:2], node.name("hidden")))]


def multi_head(node: GraphNode) -> list[Value]:
    """MultiHeadAttention of onnxruntime."""
    value = _first(node, 0)
    _given(node, 1, 2, 6, 7)
    node.common(3)
    mask = node.maybe(4)
    if mask is not None and mask.rank < 2:
        raise unsure("takes a mask whose first dimension is not the rows")
    _given(node, 4)
    _aligned(node, 5, 4)
    if value.rank != 3:
        raise unsure("takes packed queries")
    result = resized(value, (*value.sizes[:2], node.name("hidden")))
    caches = [resized(value, (BATCH, *[node.name(f"{what} {axis}") for axis in range(3)])) for what in ("key", "value")]
    return [result, *caches]


def biased(node: GraphNode) -> list[Value]:
    """Activations of onnxruntime, some with a bias along the last dimension."""
    return [node.broadcast(*(node.data(index) for index, value in enumerate(node.inputs) if value is not None))]


def weight_only(node: GraphNode) -> list[Value]:
    """MatMulNBits: the weights are packed; all inputs but the first factor are the same for all rows."""
    value = node.data(0)
    node.common(*range(1, len(node.inputs)))
    node.apart(value, -1)
    return [resized(value, (*value.sizes[:-1], node.name("columns")))]


def scaled_matmul(node: GraphNode) -> list[Value]:
    """MatMulIntegerToFloat: integers by common scales."""
    node.common(2, 3, 4, 5, 6)
    for index in (2, 4):
        scale = node.maybe(index)
        if scale is not None and scale.shape not in ((), (ONE,)):
            raise unsure("scales the rows of a factor separately")
    return [typed(product_of(node, node.data(0), node.data(1)), 1)]


def quantized_pair(node: GraphNode) -> list[Value]:
    """QLinearAdd and QLinearMul: two tensors with their scales."""
    node.common(1, 2, 4, 5, 6, 7)
    return [node.broadcast(node.data(0), node.data(3))]


def quantized_unary(node: GraphNode) -> list[Value]:
    """QLinearSigmoid and QLinearLeakyRelu."""
    node.common(*range(1, len(node.inputs)))
    return [plain(node.data(0))]


def quantized_softmax(node: GraphNode) -> list[Value]:
    """QLinearSoftmax."""
    value = node.data(0)
    node.common(*range(1, len(node.inputs)))
    node.before(value, node.whole("axis", -1))
    return [plain(value)]


def quantized_global_pool(node: GraphNode) -> list[Value]:
    """QLinearGlobalAveragePool, channels second or last."""
    value = node.leading(node.data(0))
    node.common(*range(1, len(node.inputs)))
    if node.whole("channels_last", 0):
        return [resized(value, (value.sizes[0], *[ONE] * (value.rank - 2), value.sizes[-1]))]
    return [resized(value, (*value.sizes[:2], *[ONE] * (value.rank - 2)))]


STANDARD = {"Attention": attention, "RotaryEmbedding": rotary}
ONNXRUNTIME = {
    "Attention": fused_attention,
    "MultiHeadAttention": multi_head,
    "SkipLayerNormalization": skip_norm,
    "SkipSimplifiedLayerNormalization": skip_norm,
    "EmbedLayerNormalization": embed_norm,
    **dict.fromkeys(["BiasGelu", "FastGelu", "QuickGelu", "Gelu", "BiasAdd"], biased),
    "MatMulNBits": weight_only,
    "MatMulIntegerToFloat": scaled_matmul,
    "QLinearAdd": quantized_pair,
    "QLinearMul": quantized_pair,
    "QLinearSigmoid": quantized_unary,
    "QLinearLeakyRelu": quantized_unary,
    "QLinearSoftmax": quantized_softmax,
    "QLinearGlobalAveragePool": quantized_global_pool,
}
