import numpy as np
import pytest

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import GateError
from maas_ray.export.comparison import Comparison

SCORES = TensorSpec(name="probabilities", datatype="FP32", shape=(-1, 2))
CLASSES = TensorSpec(name="class", datatype="INT64", shape=(-1,))
NUMBER = TensorSpec(name="prediction", datatype="FP32", shape=(-1, 1))


def compare(expected: list, got: list) -> dict:
    reference = {"prediction": np.array(expected, np.float32).reshape(-1, 1)}
    comparison = Comparison(Signature(inputs=(), outputs=(NUMBER,)), reference, 1, atol=1e-5, rtol=0.0)
    comparison.check({"prediction": np.array(got, np.float32).reshape(-1, 1)}, 3)
    return comparison.report()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_equals_only_itself(value: float) -> None:
    assert compare([1.0, value], [1.0, value])["max_abs_error"] == 0.0
    for other in (1.0, np.nan, np.inf, -np.inf):
        if not (value == other or (np.isnan(value) and np.isnan(other))):
            with pytest.raises(GateError, match="batch size 3, random row 0, element .0.: onnxruntime returns .*torch"):
                compare([1.0, value], [1.0, other])
            with pytest.raises(GateError, match="these must be equal"):
                compare([1.0, other], [1.0, value])


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_tolerance_of_a_regression_is_in_units_of_its_real_rows(unit: float) -> None:
    report = compare([unit, 0.0], [unit, 0.9e-5 * unit])
    assert report["max_abs_error"] == pytest.approx(0.9e-5 * unit)
    assert report["max_rel_error"] == pytest.approx(0.9)
    with pytest.raises(GateError, match="random row 0.* is above the limit"):
        compare([unit, 0.0], [unit, 1.1e-5 * unit])


@pytest.mark.parametrize(("margin", "is_tie"), [(1e-5, True), (1e-3, False)])
def test_classes_may_change_places_only_where_the_tolerance_of_their_scores_lets_them(
    margin: float, is_tie: bool
) -> None:
    scores = np.array([[0.5 + margin / 2, 0.5 - margin / 2], [0.1, 0.9]], np.float32)
    reference = {"probabilities": scores, "class": np.array([0, 1])}
    comparison = Comparison(Signature(inputs=(), outputs=(SCORES, CLASSES)), reference, 2, atol=1e-5, rtol=0.0)
    changed = {"probabilities": scores, "class": np.array([1, 1])}
    if is_tie:
        comparison.check(changed, 1)
        assert comparison.report()["top1_agreement"] == 0.5
    else:
        with pytest.raises(
            GateError, match="output 'class', batch size 1, real row 0: onnxruntime returns 1, torch returns 0"
        ):
            comparison.check(changed, 1)
