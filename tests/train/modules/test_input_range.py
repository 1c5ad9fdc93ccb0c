"""Embeddings of categories: unknown ones have a code, constructors know all codes, and what cannot be looked up is refused
before the first step.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.cleaning import CleaningSpec, Encoding, Unknown
from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn
from maas_ray.data.stored.dataset import TARGET, Dataset, save_dataset
from maas_ray.data.table.fit import fit_columns
from maas_ray.data.table.plan import plan_column
from maas_ray.errors import DataError, GateError, ModelError
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import check_parity
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import InputColumn, Row
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.modules.input_range import refuse_out_of_range
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.spec.train import TrainSpec

CITIES = ("Lima", "Oslo", "Rome")


class Codes(nn.Module):
    """One embedding for each ordinal column, as its constructor is told, or with `sizes` of its own."""

    def __init__(
        self,
        columns: tuple[InputColumn, ...],
        cardinalities: tuple[int, ...],
        num_outputs: int,
        sizes: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.places = [one.start for one in columns if one.kind == "ordinal"]
        self.others = [p for one in columns if one.kind != "ordinal" for p in range(one.start, one.start + one.width)]
        self.tables = nn.ModuleList(nn.Embedding(size, 4) for size in sizes or cardinalities)
        self.head = nn.Linear(4 * len(self.places) + len(self.others), num_outputs)

    def forward(self, rows: Tensor) -> Tensor:
        vectors = [table(rows[:, place].long()) for table, place in zip(self.tables, self.places, strict=True)]
        return self.head(torch.cat([*vectors, rows[:, self.others]], dim=1))


def _features(unknown: Unknown, encoding: Encoding = "ordinal") -> Features:
    columns = (
        NumericColumn(name="age", shift=40.0, scale=12.0),
        CategoricalColumn(name="city", categories=CITIES, encoding=encoding, unknown=unknown),
        CategoricalColumn(name="class", datatype="INT64", categories=(1, 3), encoding=encoding, unknown=unknown),
    )
    return Features(columns=columns, task="classification", target="y", labels=("no", "yes"))


def _dataset(store: ObstoreStore, features: Features) -> Dataset:
    generator, tables = np.random.default_rng(0), {}
    for split, num_rows in (("train", 40), ("validation", 0), ("test", 0)):
        columns = {
            "age": generator.normal(40, 12, num_rows).astype(np.float32),
            "city": pa.array(generator.choice(CITIES, num_rows), pa.string()),
            "class": generator.choice([1, 3], num_rows),
        }
        tables[split] = pa.table({**columns, TARGET: generator.integers(0, 2, num_rows)})
    return save_dataset(store, tables, features, {}, {})


def _spec(store: ObstoreStore, **changes: object) -> TrainSpec:
    fields = {
        "run": "r",
        "model": {"name": f"{__name__}:Codes"},
        "data": {"uri": "rows.csv", "target": "y", "task": "classification"},
        "storage": {"uri": store.uri},
    }
    return TrainSpec.model_validate({**fields, **changes})


@pytest.mark.parametrize("encoding", ["one_hot", "ordinal"])
def test_an_unknown_category_has_a_code_of_its_own(encoding: Encoding) -> None:
    features = _features("code", encoding)
    city, klass = np.array([["Rome"], ["Bonn"], ["Lima"]], object), np.array([[3], [2], [1]])
    encoded = encode_columns(features, [np.float32([[40], [52], [40]]), city, klass])
    assert [column.reshape(-1).tolist() for column in encoded[1:]] == [[2, 3, 0], [1, 2, 0]]
    rows = Preprocess(features)(*map(torch.from_numpy, encoded))
    if encoding == "ordinal":
        assert rows.tolist() == [[0, 2, 1], [1, 3, 2], [0, 0, 0]]
    else:
        assert rows[1].tolist() == [1, 0, 0, 0, 1, 0, 0, 1], "one more feature for each column"
    assert features.row.shape == (rows.shape[1],)


def test_a_module_is_told_its_columns_and_their_numbers_of_codes() -> None:
    row = _features("code").row
    assert row.columns == (
        InputColumn("age", "numeric", 0, 1),
        InputColumn("city", "ordinal", 1, 1, (1,), 4, True),
        InputColumn("class", "ordinal", 2, 1, (1,), 3, True),
    )
    assert row.cardinalities == (4, 3)
    assert _features("zeros").row.cardinalities == (3, 2)
    model = build_model(ModelSpec(name=f"{__name__}:Codes"), row, 2)
    assert [table.num_embeddings for table in model.tables] == [4, 3]


def test_the_policy_reaches_the_columns_and_the_digest_of_specs_without_it_is_unchanged() -> None:
    spec = parse_spec(
        CleaningSpec,
        {"categorical": {"encoding": "ordinal", "unknown": "code"}, "columns": {"b": {"unknown": "zeros"}}},
    )
    table = pa.table({"a": ["x", "y"], "b": ["x", "y"]})
    plans = [plan_column(spec, "categorical", field) for field in table.schema]
    columns = fit_columns(table, plans, CleaningSpec())
    assert [column.unknown_code for column in columns] == [2, -1]
    assert "unknown" in columns[0].model_dump()
    assert "unknown" not in columns[1].model_dump()
    assert "unknown" not in str(CleaningSpec().model_dump(mode="json"))
    wrong = parse_spec(CleaningSpec, {"columns": {"n": {"unknown": "code"}}})
    with pytest.raises(DataError, match="columns.n.unknown does not fit a numeric column"):
        plan_column(wrong, "numeric", pa.field("n", pa.float32()))


def test_embeddings_with_a_row_for_unknown_categories_pass_the_check_and_the_gate(file_store: ObstoreStore) -> None:
    features = _features("code")
    dataset, spec = _dataset(file_store, features), _spec(file_store)
    check_run(spec, dataset, file_store)
    net = build_model(spec.model, features.row, features.num_outputs)
    graph, _ = export(net, features)
    report = check_parity(net, features, graph, dataset.read("train").columns)
    assert report["passed"]


def test_an_unknown_category_without_a_row_is_refused_before_the_first_step(file_store: ObstoreStore) -> None:
    features = _features("zeros")
    dataset, spec = _dataset(file_store, features), _spec(file_store)
    with pytest.raises(ModelError, match=r"the embedding 'tables.0' of 3 rows gets the code -1; .*unknown: code"):
        check_run(spec, dataset, file_store)
    net = build_model(spec.model, features.row, features.num_outputs)
    graph, _ = export(net, features)
    with pytest.raises(GateError, match=r"fails on some of the rows .*IndexError.*unknown: code"):
        check_parity(net, features, graph, dataset.read("train").columns)


@pytest.mark.parametrize("layout", [{}, {"workers": {"count": 2}, "parallelism": {"dp_shard": 2}}])
def test_an_embedding_with_too_few_rows_is_refused_on_every_layout(file_store: ObstoreStore, layout: dict) -> None:
    dataset = _dataset(file_store, _features("code"))
    spec = _spec(file_store, model={"name": f"{__name__}:Codes", "params": {"sizes": [4, 2]}}, **layout)
    with pytest.raises(ModelError, match=r"the embedding 'tables.1' of 2 rows gets the code 2; .*`cardinalities`"):
        check_run(spec, dataset, file_store)


class Words(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.table = nn.Embedding(10, num_outputs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(dim=1)


def test_a_vocabulary_that_is_larger_than_the_embedding_is_refused() -> None:
    refuse_out_of_range(Words(2), Row((4,), 10))
    with pytest.raises(
        ModelError, match=r"'table' of 10 rows gets the code 11; .*token ids in \[0, 12\).*`vocab_size`"
    ):
        refuse_out_of_range(Words(2), Row((4,), 12))


class OneHot(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.one_hot(rows[:, 1].long(), 4).float()


def test_any_other_failure_on_a_code_is_refused_with_its_reason() -> None:
    with pytest.raises(ModelError, match=r"OneHot fails on the lowest or highest codes .*'city' in \[-1, 3\)"):
        refuse_out_of_range(OneHot(), _features("zeros").row)


def test_codes_that_bfloat16_rounds_are_refused_in_a_sharded_model(file_store: ObstoreStore) -> None:
    many = CategoricalColumn(
        name="zip", datatype="INT64", categories=tuple(range(400)), encoding="ordinal", unknown="code"
    )
    features = Features(columns=(many,), task="classification", target="y", labels=("no", "yes"))
    tables = {
        split: pa.table({"zip": np.arange(count), TARGET: np.arange(count) % 2})
        for split, count in (("train", 400), ("validation", 0), ("test", 0))
    }
    dataset = save_dataset(file_store, tables, features, {}, {})
    sharded = {"workers": {"count": 2}, "parallelism": {"dp_shard": 2}}
    check_run(_spec(file_store, **sharded), dataset, file_store)
    with pytest.raises(ModelError, match="'zip' has 401 ordinal codes"):
        check_run(_spec(file_store, precision="bf16", **sharded), dataset, file_store)
