"""Runs in fixed buffers on the CPU: bucket selection, padding, removal of padding, and isolation from earlier rows."""

import numpy as np
import onnxruntime as ort
import pytest

from maas_ray.bundle.engine.buckets import Buckets, can_be_fixed
from maas_ray.bundle.format import Signature, TensorSpec
from tests.support.onnx_models import LINEAR, LOOKUP, MIXED, UNBATCHED, linear, lookup


def session(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("num_rows", "size"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 16), (16, 16), (17, None)])
def test_the_smallest_bucket_that_holds_the_rows_is_chosen(num_rows: int, size: int | None) -> None:
    assert Buckets(session(linear()), LINEAR, (16, 2, 4, 4), device="cpu").size_for(num_rows) == size


def test_any_number_of_rows_gives_the_results_of_a_plain_run() -> None:
    plain = session(linear())
    buckets = Buckets(plain, LINEAR, (2, 8, 32), device="cpu")
    random = np.random.default_rng(0)
    kept = []
    for _ in range(300):
        x = random.random((int(random.integers(1, 33)), 3), np.float32)
        y = buckets.run({"x": x}, len(x))["y"]
        kept.append((x, y))
    for x, y in kept:  # only now: an answer that shared its memory with a later run would have changed
        np.testing.assert_array_equal(y, plain.run(["y"], {"x": x})[0])


def test_padding_is_never_the_rows_of_an_earlier_run() -> None:
    buckets = Buckets(session(lookup()), LOOKUP, (4,), device="cpu")
    with pytest.raises(Exception, match="indices element out of data bounds"):
        buckets.run({"index": np.full((4, 1), 99, np.int64)}, 4)
    outputs = buckets.run({"index": np.array([[3]], np.int64)}, 1)
    assert outputs["y"].tolist() == [[30.0]], "one row; the poison before it failed alone"


def test_more_rows_than_the_largest_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="9 rows exceed the largest bucket, 8"):
        Buckets(session(linear()), LINEAR, (8,), device="cpu").run({"x": np.ones((9, 3), np.float32)}, 9)


def test_graphs_with_strings_or_other_free_sizes_have_no_buckets() -> None:
    free = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),), outputs=LINEAR.outputs)
    assert can_be_fixed(LINEAR)
    assert [can_be_fixed(signature) for signature in (MIXED, UNBATCHED, free)] == [False, False, False]
