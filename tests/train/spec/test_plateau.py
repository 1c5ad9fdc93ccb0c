import pytest
import torch

from maas_ray.train.spec.plateau import Plateau

LOSSES = [1.0, 0.8, 0.8, 0.79, 0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]


def _history(values: list[float]) -> list[dict]:
    entries: list[dict] = []
    for step, value in enumerate(values, start=1):
        entries += [{"step": step, "loss": 9.0, "lr": 1.0}, {"step": step, "validation": {"loss": value}}]
    return entries


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_follows_the_rule_of_torch(mode: str) -> None:
    sign = 1 if mode == "min" else -1
    history = _history([sign * value for value in LOSSES])
    rule = Plateau("validation_loss", mode, factor=0.5, patience=3, min_delta=0.05, lowest=0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch lowers the rate when more than `patience` values are bad, this package when that many are.
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.5, patience=2, threshold=0.05, threshold_mode="abs", min_lr=0.2
    )
    scales = []
    for number, value in enumerate(LOSSES, start=1):
        theirs.step(sign * value)
        scales.append(rule.follow(history[: 2 * number]))
        assert scales[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert scales[0] == 1.0
    assert scales[-1] == 0.2


def test_a_resumed_run_has_the_scale_of_an_uninterrupted_one() -> None:
    history = _history(LOSSES)
    whole = Plateau("validation_loss", "min", factor=0.5, patience=2)
    steadily = [whole.follow(history[:length]) for length in range(len(history) + 1)]
    assert [
        Plateau("validation_loss", "min", factor=0.5, patience=2).follow(history[:length])
        for length in range(len(history) + 1)
    ] == steadily
