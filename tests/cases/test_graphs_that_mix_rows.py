"""Graphs of 59 kinds that mix rows and of 69 that do not: no response has another client's rows, and safe ones batch.

The short form has one graph of each kind, the long one every datatype and rank and 100,000 responses in total. With the
analysis disabled the same check finds wrong responses, although the probes are still enabled.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest

from maas_ray.bundle.axis.compare import differs
from maas_ray.bundle.axis.judge import Verdict
from maas_ray.bundle.axis.probe import Probed
from maas_ray.bundle.engine import engine as engine_module
from tests.support.graph_zoo import HARMLESS, MIXING, SHAPES, Builder, Specimen, specimens
from tests.support.together import ask_together, load

_RTOL = 1e-3
log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What many callers have got."""

    num_answers: int = 0
    wrong: dict[str, int] = field(default_factory=dict)
    """Wrong responses by graph."""
    kinds: set[str] = field(default_factory=set)
    unmerged: dict[str, str] = field(default_factory=dict)
    """Graphs whose requests ran one by one, and why."""


def ask(zoo: Iterable[Specimen], num_requests: int) -> Outcome:
    """Sends concurrent requests to each graph, and compares each response with that of the request alone."""
    outcome = Outcome()
    for specimen in zoo:
        engine = load(specimen.bundle)
        requests = specimen.requests(num_requests)
        answers, counted = ask_together(engine, requests)
        outcome.kinds.add(specimen.kind)
        outcome.num_answers += len(answers)
        if max(counted.runs) == 1:
            outcome.unmerged[specimen.name] = engine.not_merged_because
        for request, answer in zip(requests, answers, strict=True):
            right = engine.run(request)
            if not isinstance(answer, dict) or any(differs(answer[name], right[name], _RTOL) for name in right):
                outcome.wrong[specimen.name] = outcome.wrong.get(specimen.name, 0) + 1
        engine.close()
    return outcome


def short(kinds: Mapping[str, Builder]) -> Iterable[Specimen]:
    return specimens(kinds, rows=SHAPES[1:], one_of_each=True)


def test_graphs_that_mix_their_rows_never_do_so_for_callers() -> None:
    outcome = ask(short(MIXING), 8)
    assert outcome.wrong == {}
    assert len(outcome.kinds) == len(MIXING) >= 40
    assert len(outcome.unmerged) == len(MIXING), "none of them shares a run"
    assert all(outcome.unmerged.values()), "each with a reason"


def test_graphs_that_keep_their_rows_apart_share_runs() -> None:
    outcome = ask(short(HARMLESS), 8)
    assert outcome.wrong == {}
    assert outcome.unmerged == {}
    assert len(outcome.kinds) == len(HARMLESS) >= 40


def without_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "judge", lambda signature, model: (signature, Verdict()))


def test_with_the_analysis_switched_off_answers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    without_analysis(monkeypatch)
    hidden = {name: MIXING[name] for name in ("mixed at a value", "count of a value", "largest of a value")}
    outcome = ask(short(hidden), 8)
    assert set(outcome.wrong) == {f"{name} FP32 [4]" for name in hidden}, "the probes alone do not see them"


def test_with_the_probes_switched_off_too_nearly_every_kind_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    without_analysis(monkeypatch)
    monkeypatch.setattr(engine_module, "probe", lambda run, signature: Probed())
    outcome = ask(short(MIXING), 8)
    assert len(outcome.wrong) >= 0.9 * len(MIXING), sorted(outcome.wrong)


@pytest.mark.fault
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kinds", [MIXING, HARMLESS], ids=["mixing", "harmless"])
def test_50_000_answers_are_those_of_each_request_alone(
    kinds: Mapping[str, Builder], caplog: pytest.LogCaptureFixture
) -> None:
    outcome = ask(specimens(kinds), 72)
    with caplog.at_level("INFO"):
        log.info(
            "%d answers, %d wrong; %d graphs did not share runs",
            outcome.num_answers, sum(outcome.wrong.values()), len(outcome.unmerged),
        )  # fmt: skip
    assert outcome.wrong == {}
    assert outcome.num_answers >= 50_000
    assert bool(outcome.unmerged) == (kinds is MIXING)
