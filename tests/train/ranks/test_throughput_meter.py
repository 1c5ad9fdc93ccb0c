"""Operations per row, and the share of the peak that follows; a trace of some steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_net
from maas_ray.train.loop.progress import Progress
from maas_ray.train.ranks.profiler import Profiler
from maas_ray.train.ranks.throughput_meter import Rates, count_flops
from maas_ray.train.spec.performance import ProfileSpec
from tests.support.small_runs import make_run

CPU = torch.device("cpu")


def test_a_row_takes_six_operations_per_weight_and_token(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    net = build_net(spec, dataset.features)
    sizes = [weight.numel() for name, weight in net.named_parameters() if weight.dim() > 1]
    # The first layer needs no gradient of its input.
    assert count_flops(spec, dataset.features) == 6 * sum(sizes) - 2 * sizes[0]


def test_attention_is_counted_too(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder")
    net = build_net(spec, dataset.features)
    used = sum(weight.numel() for name, weight in net.named_parameters() if weight.dim() > 1 and "embed" not in name)
    length, width, layers = 8, 32, 4
    expected = 6 * used * length + 12 * layers * length**2 * width
    assert count_flops(spec, dataset.features) == pytest.approx(expected, rel=0.02)


def test_the_share_of_the_peak_and_the_tokens_follow_from_the_samples(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder", performance={"peak_tflops": 0.001})
    rates = Rates(spec, dataset.features, CPU, 2)
    progress = rates.added_to(Progress(1, 3, 0.1, loss=1.0, samples_per_s=100.0))
    flops = count_flops(spec, dataset.features)
    assert flops is not None
    assert progress.tokens_per_s == 800.0
    assert progress.mfu == pytest.approx(100.0 * flops / (2 * 0.001e12))
    assert rates.added_to(Progress(1, 3, 0.1, metrics={"loss": 1.0})).mfu is None


def test_no_share_is_made_up_where_the_peak_is_unknown_or_the_model_cannot_be_traced(
    file_store: ObstoreStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    progress = Rates(spec, dataset.features, CPU, 1).added_to(Progress(1, 3, 0.1, samples_per_s=100.0))
    assert (progress.mfu, progress.tokens_per_s) == (None, None)
    asked = {"performance": {"peak_tflops": 1.0}}
    spec, dataset = make_run(file_store, tmp_path, "tests.support.nets:LooksAtValues", **asked)
    assert Rates(spec, dataset.features, CPU, 1).added_to(Progress(1, 3, 0.1, samples_per_s=100.0)).mfu is None
    assert "operations cannot be counted" in caplog.text


@pytest.mark.parametrize(("first", "last", "expected"), [(2, 5, [2, 3]), (4, 4, [4]), (9, 5, [])])
def test_the_trace_contains_the_named_steps_of_a_run_that_ends_among_them(
    first: int, last: int, expected: list[int]
) -> None:
    kept: dict[str, bytes] = {}
    profiler = Profiler(ProfileSpec(first_step=first, steps=2), 1, kept.__setitem__)
    for step in range(1, last + 1):
        profiler.begin(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(8) @ torch.ones(8)
    profiler.close()
    assert list(kept) == ([f"step-{first}-rank-1.json.gz"] if expected else [])
    for trace in kept.values():
        names = {event.get("name") for event in json.loads(gzip.decompress(trace))["traceEvents"]}
        assert {name for name in names if str(name).startswith("step ")} == {f"step {step}" for step in expected}
        assert "aten::dot" in names
