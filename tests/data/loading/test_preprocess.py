"""Preprocessing agrees with an independent computation in NumPy, and so does its exported graph."""

import io
import math

import numpy as np
import onnxruntime
import pytest
import torch

from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.features import (
    UNKNOWN,
    CategoricalColumn,
    Column,
    Features,
    NumericColumn,
    TensorColumn,
)
from maas_ray.errors import DataError

AGE = NumericColumn(name="age", fill=30.0, shift=29.5, scale=14.25)
FARE = NumericColumn(name="fare", shift=-1.5, scale=1e-3)
CITY = CategoricalColumn(name="city", categories=("Lima", "Oslo", "Rome"), fill=0)
RANK = CategoricalColumn(name="rank", datatype="INT64", categories=(1, 5), encoding="ordinal")
SEX = CategoricalColumn(name="sex", categories=("f", "m"))
VECTOR = TensorColumn(name="v", shape=(3,), fill=0.5, shift=(1.0, 2.0, 3.0), scale=(0.5, 1.0, 3.0))
IMAGE = TensorColumn(name="image", datatype="UINT8", shape=(1, 4, 4), shift=(33.0,), scale=(79.0,))
FLOATS = TensorColumn(name="floats", shape=(2, 2), fill=-1.0, shift=(0.25,), scale=(2.0,))

TABLES = {
    "mixed": (AGE, CITY, FARE, RANK, SEX, VECTOR, IMAGE),
    "numeric": (AGE, FARE),
    "ordinal": (RANK,),
    "one_hot": (CITY, SEX),
    "image": (IMAGE,),
    "tensor with holes": (FLOATS,),
    "vector": (VECTOR,),
    "two tensors": (IMAGE, FLOATS),
}


def _features(columns: tuple[Column, ...]) -> Features:
    return Features(columns=columns, task="regression", target="y")


def _rows(columns: tuple[Column, ...], n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = []
    for column in columns:
        if column.kind == "categorical":
            rows.append(rng.integers(UNKNOWN, len(column.categories), size=(n, 1)))
            continue
        shape = (n, 1) if column.kind == "numeric" else (n, *column.shape)
        if column.kind == "tensor" and column.datatype == "UINT8":
            rows.append(rng.integers(0, 256, size=shape).astype(np.uint8))
            continue
        values = (rng.normal(size=shape) * 50).astype(np.float32)
        if column.fill is not None:
            values[rng.random(size=shape) < 0.3] = np.nan
        rows.append(values)
    return rows


def _expected(columns: tuple[Column, ...], rows: list[np.ndarray]) -> np.ndarray:
    """In float64, column by column and element by element."""
    parts = []
    for column, values in zip(columns, rows, strict=True):
        if column.kind == "categorical" and column.encoding == "ordinal":
            parts.append(values.astype(np.float64))
        elif column.kind == "categorical":
            part = np.zeros((len(values), len(column.categories)))
            for i, code in enumerate(values[:, 0]):
                if code != UNKNOWN:
                    part[i, code] = 1
            parts.append(part)
        else:
            x = values.astype(np.float64)
            if column.fill is not None:
                x[np.isnan(x)] = column.fill
            shift, scale = np.array(column.shift), np.array(column.scale)
            if column.kind == "tensor" and len(column.shift) > 1:
                shift, scale = shift.reshape(column.shape), scale.reshape(column.shape)
            parts.append((x - shift) / scale)
    if len(parts) == 1 and columns[0].kind == "tensor":
        return parts[0]
    return np.concatenate([part.reshape(len(part), math.prod(part.shape[1:])) for part in parts], axis=1)


def _tensors(rows: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(values) for values in rows]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("n", [0, 1, 50])
def test_preprocessing_equals_an_independent_computation(name: str, n: int) -> None:
    columns = TABLES[name]
    rows = _rows(columns, n)
    found = Preprocess(_features(columns))(*_tensors(rows))
    assert found.dtype == torch.float32
    assert found.shape == (n, *_features(columns).row.shape)
    np.testing.assert_allclose(found.numpy(), _expected(columns, rows), rtol=1e-6, atol=1e-6)


def test_the_comparison_sees_a_changed_statistic() -> None:
    rows = _rows((AGE,), 50)
    wrong = Preprocess(_features((AGE.model_copy(update={"fill": 30.01}),)))(*_tensors(rows))
    assert not np.allclose(wrong.numpy(), _expected((AGE,), rows), rtol=1e-6, atol=1e-6)


def test_nothing_is_learned_and_nothing_is_saved_with_the_weights() -> None:
    module = Preprocess(_features(TABLES["mixed"]))
    assert not list(module.parameters())
    assert not module.state_dict()


def test_another_number_of_columns_is_refused() -> None:
    with pytest.raises(DataError, match="got 1 columns; expected 2"):
        Preprocess(_features((AGE, FARE)))(torch.zeros(2, 1))


# torch 2.13's exporter uses its own deprecated LeafSpec.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["mixed", "tensor with holes"])
def test_the_exported_graph_computes_the_same_for_every_batch_size(name: str) -> None:
    columns = TABLES[name]
    module = Preprocess(_features(columns)).eval()
    example = tuple(_tensors(_rows(columns, 3)))
    program = torch.onnx.export(
        module,
        example,
        dynamo=True,
        dynamic_shapes=(tuple({0: torch.export.Dim.DYNAMIC} for _ in example),),
        verbose=False,
    )
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    for n in (1, 2, 3, 17):
        rows = _rows(columns, n, seed=n)
        (found,) = session.run(None, dict(zip(names, rows, strict=True)))
        np.testing.assert_allclose(found, _expected(columns, rows), rtol=1e-6, atol=1e-6)
