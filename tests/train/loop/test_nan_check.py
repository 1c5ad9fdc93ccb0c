"""A state that is not finite is never committed: whatever holds the number, on whichever rank."""

import pytest
import torch
from torch import Tensor

from maas_ray.errors import TrainingFailed
from maas_ray.train.loop.nan_check import refuse_not_finite
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def _state() -> dict[str, Tensor]:
    return {
        "model.weight": torch.randn(3, 4),
        "model.mask": torch.tensor([0.0, -torch.inf]),
        "model.count": torch.tensor(7),
        "optimizer.weight.exp_avg_sq": torch.full((3, 4), 3e38),  # finite, though its sum is not
        "ema.weight": torch.zeros(0),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.weight", "optimizer.weight.exp_avg_sq"])
def test_a_number_that_is_not_finite_ends_the_run_and_is_named(name: str, value: float) -> None:
    state = _state()
    refuse_not_finite(state, 8, CPU, {"model.mask"})
    state[name][1, 2] = value
    with pytest.raises(
        TrainingFailed, match=f"after step 8 {name} contains a NaN or infinite number; .* not committed"
    ):
        refuse_not_finite(state, 8, CPU, {"model.mask"})


def test_a_mask_may_be_infinite_but_never_nan() -> None:
    state = _state()
    with pytest.raises(TrainingFailed, match="model.mask"):
        refuse_not_finite(state, 1, CPU)
    state["model.mask"][0] = torch.nan
    with pytest.raises(TrainingFailed, match="model.mask"):
        refuse_not_finite(state, 1, CPU, {"model.mask"})


def _on_rank(rank: int) -> str:
    state = _state()
    if rank == 1:
        state["model.weight"][0, 0] = torch.nan
    try:
        refuse_not_finite(state, 3, CPU, {"model.mask"})
    except TrainingFailed as error:
        return str(error)
    return ""


@pytest.mark.fault
def test_all_ranks_refuse_a_state_that_is_not_finite_on_one() -> None:
    first, second = run_ranks(_on_rank, 2)
    assert "after step 3 a tensor of another rank contains" in first
    assert "after step 3 model.weight contains" in second
