"""Merge guard: a graph that mixes its rows, undetected by the analysis, is detected while it serves."""

import logging

import numpy as np
import pytest

from maas_ray.bundle.axis.judge import Verdict
from maas_ray.bundle.axis.probe import Probed
from maas_ray.bundle.engine import engine as engine_module
from maas_ray.bundle.format import Bundle
from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.merge_guard import Guard, Sample
from maas_ray.serve.telemetry.stats import ModelStats
from tests.cases.test_rows_are_never_mixed import bundle_of, mean_over_the_batch
from tests.support.onnx_models import make_bundle
from tests.support.together import ask_together, load


@pytest.fixture
def believing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the analysis and the probes: everything with a variable first dimension is merged."""
    monkeypatch.setattr(engine_module, "judge", lambda signature, model: (signature, Verdict()))
    monkeypatch.setattr(engine_module, "probe", lambda run, signature: Probed())


def requests_of(bundle: Bundle, count: int) -> list[dict[str, np.ndarray]]:
    (tensor,) = bundle.info.signature.inputs
    kind = np.int64 if tensor.datatype == "INT64" else np.float32
    return [{tensor.name: np.full((1, *tensor.shape[1:]), 1 + number**2, kind)} for number in range(count)]


@pytest.mark.usefixtures("believing")
def test_a_graph_that_mixes_its_rows_is_noticed_and_no_longer_merged(caplog: pytest.LogCaptureFixture) -> None:
    bundle = bundle_of(mean_over_the_batch("batch"))
    engine = load(bundle)
    assert engine.can_merge, "planted past the analysis"
    answers, counted = ask_together(engine, requests_of(bundle, 10), num_rounds=3, check_share=0.05)
    wrong = [answer["y"].tolist() != [[0.0]] for answer in answers]
    assert any(wrong[:20])
    assert not any(wrong[20:]), "the third round is after the check, at the twentieth request"
    assert counted.runs == [10, 10, *[1] * 10]
    assert [bool(found) for found in counted.checks] == [True]
    assert "mixes the rows of requests" in counted.problem
    assert counted.problem in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR


def test_a_graph_that_keeps_its_rows_apart_passes_every_check() -> None:
    bundle = make_bundle()
    _, counted = ask_together(load(bundle), requests_of(bundle, 10), num_rounds=5, check_share=1.0)
    assert counted.checks == [""] * 5
    assert counted.runs == [10] * 5
    assert not counted.problem


def test_checks_can_be_left_out() -> None:
    bundle = make_bundle()
    _, counted = ask_together(load(bundle), requests_of(bundle, 10), num_rounds=5, check_share=0.0)
    assert counted.checks == []


def taken(batch: list[int], outputs: np.ndarray) -> tuple[Guard, Sample]:
    guard = Guard(1.0)
    items = [Item({"x": np.full((rows, 1), rows)}, rows, 1, 0.0, lambda *outcome: None) for rows in batch]
    guard.take(items, {"y": outputs})
    assert guard.sample is not None
    return guard, guard.sample


def test_integers_that_differ_by_rounding_are_equal() -> None:
    guard, sample = taken([2, 1], np.array([[7], [8], [9]]))
    assert sample.start == 2
    assert guard.compare(sample, {"y": np.array([[8]])}) == ""
    repeated = guard.sample
    assert repeated is not None
    inputs, num_rows = repeated.feed()
    assert (inputs["x"].ravel().tolist(), num_rows) == ([1, 1, 1], 3)
    assert guard.compare(repeated, {"y": np.array([[9], [9], [9]])}) == ""
    assert guard.compare(repeated, {"y": np.array([[9], [9], [8]])}), "another neighbor, another answer"


def test_whole_numbers_that_flip_again_and_again_are_a_difference() -> None:
    guard = Guard(1.0)
    found = []
    for _ in range(3):
        guard.take([Item({"x": np.ones((1, 1))}, 1, 1, 0.0, lambda *outcome: None)], {"y": np.array([[4]])})
        assert guard.sample is not None
        sample, guard.sample = guard.sample, None
        found.append(guard.compare(sample, {"y": np.array([[5]])}))
        if guard.sample is not None:
            sample, guard.sample = guard.sample, None
            assert guard.compare(sample, {"y": np.array([[4]])}) == ""
    assert [bool(each) for each in found] == [False, False, True]


def test_the_result_of_a_check_is_kept_after_an_unload() -> None:
    stats = ModelStats("m", 1)
    stats.checked("")
    stats.checked("it mixes")
    stats.checked("")
    assert stats.mixes == "it mixes"
    snapshot = stats.snapshot()
    assert (snapshot["merge_checks"], snapshot["merge_differences"]) == (3, 1)
