"""Tables of other people with the first spec that a user would write: trained, published, served, predicted; or refused
with the edit that works, which is then made."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from maas_ray.cli.app import app
from maas_ray.errors import DataError, SpecError
from maas_ray.optimize.publish import export_run
from maas_ray.registry.models import Registry
from maas_ray.serve.deploy.pool import deploy, undeploy
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.evaluate_run import evaluate_run
from tests.conftest import RayCluster

TABLES = Path(__file__).parents[1] / "tables"
POOL = "first-specs"


@dataclass(frozen=True)
class First:
    """A first spec, and what becomes of it."""

    file: str
    target: str
    task: str
    refusal: str | None = None
    """A regular expression of the refusal; None: the first spec trains."""
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `data` that the refusal names."""
    unpredictable: str | None = None
    """A regular expression of the refusal to predict the whole file, in which rows without a target lack features too."""
    pandas: Mapping[str, Any] = field(default_factory=dict)
    """Options with which pandas reads the file, for the comparison."""

    @property
    def name(self) -> str:
        """Id of the run and of the model."""
        return f"{Path(self.file).stem}-{self.target}".lower().translate(str.maketrans(" ()'", "----")).strip("-")


MEAN = {"numeric": {"missing": "mean"}, "categorical": {"missing": "most_frequent"}}


def dated(column: str, cleaning: Mapping[str, Any] = {}, **options: str) -> dict[str, Any]:  # never changed
    """The edit that reads a column as dates."""
    return {"cleaning": {**cleaning, "columns": {column: {"cast": "date", **options}}}}


FIRST = [
    First(
        "penguins.csv",
        "species",
        "classification",
        r"5 columns need a decision: \(1\) column 'bill_length_mm' has 2 missing values in 344 rows; set cleaning.numeric.missing",
        {"cleaning": MEAN},
    ),
    First(
        "penguins.csv",
        "body_mass_g",
        "regression",
        "'sex' has 9 missing values .* cleaning.categorical.missing",
        {"cleaning": MEAN},
    ),
    First("penguins.csv", "sex", "binary", unpredictable="2 missing values, for which the model has no replacement"),
    First(
        "penguins-raw.csv",
        "Species",
        "classification",
        r"'Date Egg' contains dates.*cast: date.*cleaning.numeric.missing.*'Individual ID' has 89 categories in 105 rows",
        dated("Date Egg", {**MEAN, "drop": ["Individual ID"]}),
    ),
    First(
        "seattle-weather.csv",
        "weather",
        "classification",
        "'date' contains dates.*cast: date",
        dated("date", encoding="cyclic"),
    ),
    First(
        "seattle-weather.csv",
        "temp_max",
        "regression",
        "'date' contains dates.*cast: date",
        dated("date", encoding="parts"),
    ),
    First(
        "airports.csv",
        "state",
        "classification",
        "3 columns need a decision.*'iata' has 140 categories in 140 rows",
        {"cleaning": {"drop": ["iata", "name", "city"]}, "rare_classes": {"min_rows": 3}},
    ),
    First(
        "airports.csv",
        "latitude",
        "regression",
        "3 columns need a decision.*leave it out with cleaning.drop",
        {"cleaning": {"drop": ["iata", "name", "city"]}},
    ),
    First(
        "iowa-electricity.csv", "net_generation", "regression", "'year' contains dates", dated("year", encoding="epoch")
    ),
    First(
        "wheat.jsonl",
        "wheat",
        "regression",
        "'wages' has 2 missing values.*'year' has 37 categories in 37 rows.*cleaning.columns.year.cast to number",
        {"cleaning": {**MEAN, "columns": {"year": {"cast": "number"}}}},
    ),
    First("barley.jsonl", "yield", "regression"),
    First(
        "cars.jsonl",
        "Miles_per_Gallon",
        "regression",
        "'Year' contains dates.*'Horsepower' has 6 missing.*'Name' has 225 categories in 278 rows",
        dated("Year", {**MEAN, "drop": ["Name"]}),
    ),
    First(
        "cars.parquet", "Horsepower", "regression", "'Year' contains dates", dated("Year", {**MEAN, "drop": ["Name"]})
    ),
    First(
        "cars-with-index.csv",
        "Origin",
        "classification",
        "'Year' contains dates",
        dated("Year", {**MEAN, "drop": ["Name"]}),
    ),
    First("iris.jsonl", "species", "classification"),
    First(
        "anes96.csv",
        "'vote'",
        "binary",
        r"set data.delimiter: '\\t'",
        {"delimiter": "\t"},
        pandas={"sep": "\t", "quoting": 3},
    ),
    First("co2.csv", "co2", "regression"),
    First(
        "danish-money.csv",
        "lrm",
        "regression",
        "'period' has 38 categories in 38 rows",
        {"cleaning": {"drop": ["period"]}},
    ),
    First(
        "elec-equip.csv",
        "STS.M.I7.W.TOVT.NS0016.4.000",
        "regression",
        "'DATE' has 180 categories in 180 rows.*cleaning.columns.DATE.cast to number or date",
        dated("DATE", date_format="%b-%d-%Y"),
    ),
    First("elnino.csv", "DEC", "regression"),
    First("engel.csv", "foodexp", "regression"),
    First("grunfeld.csv", "invest", "regression"),
    First("macrodata.csv", "infl", "regression"),
    First("modechoice.csv", "choice", "binary", "set data.delimiter: ';'", {"delimiter": ";"}, pandas={"sep": ";"}),
    First("randhie.csv", "mdvis", "regression"),
    First("stackloss.csv", "STACKLOSS", "regression"),
    First(
        "statecrime.csv",
        "violent",
        "regression",
        "'state' has 36 categories in 36 rows",
        {"cleaning": {"drop": ["state"]}},
    ),
    First("strikes.csv", "duration", "regression", pandas={"skipinitialspace": True}),
    First("sunspots.csv", "SUNACTIVITY", "regression"),
]


@dataclass(frozen=True)
class Outcome:
    """What has become of a table."""

    refusal: str | None
    """The message that refused the first spec."""
    url: str
    """Of the pool that serves all of them."""
    metric: float
    """Accuracy, or the mean absolute error, of all rows of the file, from `evaluate` of each split."""
    num_rows: int


def _spec(first: First, storage: StorageSpec, data: Mapping[str, Any]) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "run": first.name,
            "model": {"name": "mlp"},
            "data": {"uri": str(TABLES / first.file), "target": first.target, "task": first.task, **data},
            "epochs": 3,
            "export_check": "off",  # each is exported a moment later
            "storage": storage.model_dump(),
        }
    )


def _train(first: First, storage: StorageSpec) -> str | None:
    """Trains with the first spec, or with its edit after a refusal, which is returned."""
    try:
        run_training(_spec(first, storage, {}))
    except (DataError, SpecError) as error:
        if not first.edit:
            raise
        run_training(_spec(first, storage, first.edit))
        return str(error)
    return None


def _evaluate(store: ObstoreStore, first: First) -> tuple[float, int]:
    found = []
    for split in ("train", "validation", "test"):
        evaluation = evaluate_run(store, first.name, split)
        found.append((evaluation.metrics["mae" if first.task == "regression" else "accuracy"], evaluation.num_rows))
    rows = sum(number for _, number in found)
    return sum(metric * number for metric, number in found) / rows, rows


@pytest.fixture(scope="module")
def outcomes(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    storage = StorageSpec(uri=f"file://{tmp_path_factory.mktemp('first')}/store")
    store = open_store(storage)
    registry = Registry(store)
    url = f"http://127.0.0.1:{ray_cluster.http_port}/{POOL}"
    found = {}
    for first in FIRST:
        refusal = _train(first, storage)
        registry.promote(first.name, registry.publish(first.name, export_run(store, first.name).bundle_id).version)
        found[first.name] = Outcome(refusal, url, *_evaluate(store, first))
    pool = {"name": POOL, "route_prefix": f"/{POOL}", "models": [{"name": first.name} for first in FIRST]}
    http = {"port": ray_cluster.http_port}
    deploy(ServeSpec.model_validate({"storage": storage.model_dump(), "http": http, "pools": [pool]}))
    yield found
    undeploy([POOL])


def _targets(first: First) -> list[str | None]:
    """The target of each row as text, read without the product; None: missing."""
    path = TABLES / first.file
    if path.suffix == ".csv":
        frame = pandas.read_csv(path, **first.pandas)
        values = frame[first.target].tolist()
    elif path.suffix == ".parquet":
        values = pyarrow.parquet.read_table(path).column(first.target).to_pylist()
    else:
        values = [json.loads(line)[first.target] for line in path.read_text().splitlines()]
    return [None if value is None or value != value else str(value) for value in values]  # NaN


@pytest.mark.fault
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("first", FIRST, ids=[first.name for first in FIRST])
def test_a_table_of_others_is_served_as_it_was_evaluated(first: First, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[first.name]
    assert (outcome.refusal is None) == (first.refusal is None), outcome.refusal
    if first.refusal is not None:
        assert re.search(first.refusal, outcome.refusal or ""), outcome.refusal
    command = ["predict", first.name, "--input", str(TABLES / first.file), "--url", outcome.url, "--json"]
    done = CliRunner().invoke(app, command)
    if first.unpredictable is not None:
        assert done.exit_code == 1
        assert re.search(first.unpredictable, done.output)
        return
    assert done.exit_code == 0, done.output
    predictions = json.loads(done.stdout.splitlines()[-1])["predictions"]
    targets = _targets(first)
    assert len(predictions) == len(targets)
    pairs = [(row, target) for row, target in zip(predictions, targets, strict=True) if target is not None]
    assert len(pairs) == outcome.num_rows
    if first.task == "regression":
        errors = [abs(row["prediction"] - float(target.replace(",", "."))) for row, target in pairs]
        assert sum(errors) / len(errors) == pytest.approx(outcome.metric, rel=1e-4)
    else:
        merges = "rare_classes" in first.edit
        right = [
            str(row["class"]) == ("other" if merges and target not in row["probabilities"] else target)
            for row, target in pairs
        ]
        assert sum(right) / len(right) == pytest.approx(outcome.metric, abs=1e-6)
