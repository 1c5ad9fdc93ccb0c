"""The ONNX graphs of the workloads, built node by node with random weights. Knows nothing of requests or servers."""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUT, OUTPUT = "x", "y"
OPSET = 17


class _Graph:
    """Collects nodes and weights; every method returns the name of what it made."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._random = np.random.default_rng(seed)

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def weight(self, value: np.ndarray) -> str:
        name = f"w_{len(self.weights)}"
        self.weights[name] = value
        return name

    def matrix(self, *shape: int) -> str:
        return self.weight((self._random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def linear(self, x: str, num_in: int, num_out: int, output: str | None = None) -> str:
        product = self.node("MatMul", x, self.matrix(num_in, num_out))
        return self.node("Add", product, self.matrix(num_out), output=output)

    def norm(self, x: str, width: int) -> str:
        one, zero = np.ones(width, np.float32), np.zeros(width, np.float32)
        return self.node("LayerNormalization", x, self.weight(one), self.weight(zero), axis=-1)

    def gelu(self, x: str) -> str:
        inner = self.node("Erf", self.node("Div", x, self.weight(np.array(np.sqrt(2), np.float32))))
        return self.node("Mul", self.node("Mul", x, self.node("Add", inner, self.weight(np.array(1, np.float32)))), self.weight(np.array(0.5, np.float32)))  # fmt: skip

    def build(self, kind: int, num_in: Sequence[int], num_out: int) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "benchmark",
            [helper.make_tensor_value_info(INPUT, kind, ["n", *num_in])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", num_out])],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        # A version that the onnxruntime of every peer reads.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        return model.SerializeToString()


def mlp(*widths: int) -> bytes:
    """A perceptron with ReLU between its layers: FP32 [n, widths[0]] to FP32 [n, widths[-1]]."""
    graph, x = _Graph(), INPUT
    for index, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        is_last = index == len(widths) - 2
        x = graph.linear(x, num_in, num_out, output=OUTPUT if is_last else None)
        x = x if is_last else graph.node("Relu", x)
    return graph.build(TensorProto.FLOAT, [widths[0]], widths[-1])


def encoder(num_layers: int, width: int, sequence: int, num_heads: int = 4, vocabulary: int = 1000) -> bytes:
    """A BERT-like encoder: INT64 token ids [n, sequence] to FP32 [n, 8] from the mean over the sequence."""
    graph = _Graph()
    head = width // num_heads
    split = graph.weight(np.array([0, sequence, num_heads, head], np.int64))
    merged = graph.weight(np.array([0, sequence, width], np.int64))
    scale = graph.weight(np.array(1 / np.sqrt(head), np.float32))
    x = graph.node("Gather", graph.matrix(vocabulary, width), INPUT)
    x = graph.norm(graph.node("Add", x, graph.matrix(sequence, width)), width)
    for _ in range(num_layers):
        query, key, value = (graph.node("Reshape", graph.linear(x, width, width), split) for _ in range(3))
        query, value = (graph.node("Transpose", part, perm=[0, 2, 1, 3]) for part in (query, value))
        scores = graph.node("MatMul", query, graph.node("Transpose", key, perm=[0, 2, 3, 1]))
        weights = graph.node("Softmax", graph.node("Mul", scores, scale), axis=-1)
        mixed = graph.node("Transpose", graph.node("MatMul", weights, value), perm=[0, 2, 1, 3])
        attended = graph.linear(graph.node("Reshape", mixed, merged), width, width)
        x = graph.norm(graph.node("Add", x, attended), width)
        inner = graph.gelu(graph.linear(x, width, 4 * width))
        x = graph.norm(graph.node("Add", x, graph.linear(inner, 4 * width, width)), width)
    pooled = graph.node("ReduceMean", x, axes=[1], keepdims=0)
    graph.linear(pooled, width, 8, output=OUTPUT)
    return graph.build(TensorProto.INT64, [sequence], 8)


def image(num_channels: int = 3, size: int = 224) -> bytes:
    """A model that costs next to nothing on a large input: FP32 [n, channels, size, size] to FP32 [n, 10]."""
    graph = _Graph()
    pooled = graph.node("Flatten", graph.node("GlobalAveragePool", INPUT), axis=1)
    graph.linear(pooled, num_channels, 10, output=OUTPUT)
    return graph.build(TensorProto.FLOAT, [num_channels, size, size], 10)
