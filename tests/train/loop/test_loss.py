import pytest
import torch
from torch.nn import functional

from maas_ray.errors import ModelError, SpecError
from maas_ray.train.loop.loss import build_loss, num_valid
from maas_ray.train.spec.optim import LOSSES_BY_TASK, ObjectiveSpec

LOGITS = torch.tensor([[0.5], [-2.0], [3.0]])
NUMBERS = torch.tensor([1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, [0.25, 1.0, 9.0]),
        ({"loss": "mse"}, [0.25, 1.0, 9.0]),
        ({"loss": "mae"}, [0.5, 1.0, 3.0]),
        ({"loss": "huber", "huber_delta": 2.0}, [0.125, 0.5, 4.0]),
    ],
)
def test_a_regression_loss_is_given_per_sample(spec: dict, expected: list[float]) -> None:
    losses = build_loss(ObjectiveSpec(**spec), "regression")(LOGITS, NUMBERS)
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_bce_takes_logits() -> None:
    losses = build_loss(ObjectiveSpec(), "binary")(LOGITS, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(
        losses, -torch.log(torch.tensor([0.5, -2.0, 3.0]).mul(torch.tensor([1, -1, -1])).sigmoid())
    )


def test_cross_entropy_is_the_negative_log_probability_of_the_class() -> None:
    logits, target = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    losses = build_loss(ObjectiveSpec(), "classification")(logits, target)
    torch.testing.assert_close(losses, -logits.softmax(1)[torch.arange(5), target].log())


def test_label_smoothing_moves_a_share_of_the_target_to_all_classes() -> None:
    spec = ObjectiveSpec(label_smoothing=0.2)
    logits = torch.randn(1, 4)
    smooth = torch.tensor([[0.05, 0.85, 0.05, 0.05]])
    torch.testing.assert_close(
        build_loss(spec, "classification")(logits, torch.tensor([1])), -(smooth * logits.log_softmax(1)).sum(1)
    )
    torch.testing.assert_close(
        build_loss(spec, "binary")(LOGITS, torch.ones(3)),
        functional.binary_cross_entropy_with_logits(LOGITS[:, 0], torch.full((3,), 0.9), reduction="none"),
    )


@pytest.mark.parametrize("task", LOSSES_BY_TASK)
def test_no_rows_give_no_losses_and_zero_gradients(task: str) -> None:
    per_token = task.endswith("language_modeling")
    has_codes = per_token or task == "classification"
    logits = torch.zeros((0, 5, 3) if per_token else (0, 3 if has_codes else 1), requires_grad=True)
    target = torch.zeros((0, 5) if per_token else 0, dtype=torch.int64 if has_codes else torch.float32)
    losses = build_loss(ObjectiveSpec(), task)(logits, target)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad is not None


def test_the_loss_of_a_row_of_tokens_is_the_sum_over_its_counted_tokens() -> None:
    logits, target = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[1, -100, 3], [-100, -100, -100]])
    losses = build_loss(ObjectiveSpec(), "language_modeling")(logits, target)
    each = -logits.log_softmax(2)
    torch.testing.assert_close(losses, torch.stack([each[0, 0, 1] + each[0, 2, 3], torch.zeros_like(each[0, 0, 0])]))


def test_label_smoothing_of_tokens_spares_what_does_not_count() -> None:
    logits, target = torch.randn(1, 2, 4), torch.tensor([[1, -100]])
    smooth = torch.tensor([0.05, 0.85, 0.05, 0.05])
    losses = build_loss(ObjectiveSpec(label_smoothing=0.2), "masked_language_modeling")(logits, target)
    torch.testing.assert_close(losses, -(smooth * logits[0, 0].log_softmax(0)).sum().reshape(1))


@pytest.mark.parametrize("task", LOSSES_BY_TASK)
def test_float64_logits_give_float64_losses(task: str) -> None:
    per_token = task.endswith("language_modeling")
    logits = torch.randn((2, 3, 4) if per_token else (2, 4) if task == "classification" else (2, 1)).double()
    target = torch.zeros((2, 3) if per_token else 2, dtype=torch.int64 if logits.shape[-1] == 4 else torch.float32)
    assert build_loss(ObjectiveSpec(), task)(logits, target).dtype == torch.float64


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (torch.tensor([0, 2, 1]), 3),
        (torch.tensor([0.5, 2.0]), 2),
        (torch.zeros(0), 0),
        (torch.tensor([[1, -100, 0], [-100, -100, -100]]), 2),
    ],
)
def test_rows_or_counted_tokens_are_what_the_loss_is_divided_by(target: torch.Tensor, expected: int) -> None:
    assert (num_valid(target).item(), num_valid(target).dtype) == (expected, torch.int64)


def test_logits_in_lower_precision_are_widened() -> None:
    losses = build_loss(ObjectiveSpec(), "classification")(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]))
    assert losses.dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "task", "message"),
    [
        (
            {"loss": "mse"},
            "classification",
            "mse needs a number per row, but the task is classification; use cross_entropy",
        ),
        ({"loss": "cross_entropy"}, "regression", "use mse or mae or huber"),
        ({"loss": "cross_entropy"}, "binary", "use bce"),
        ({"label_smoothing": 0.1}, "regression", "label_smoothing: 0.1"),
    ],
)
def test_a_loss_that_does_not_fit_the_task_is_refused_with_the_reason(spec: dict, task: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_loss(ObjectiveSpec(**spec), task)


@pytest.mark.parametrize(
    ("task", "logits", "target"),
    [
        ("regression", torch.zeros(3), torch.zeros(3)),
        ("regression", torch.zeros(3, 3), torch.zeros(3)),
        ("regression", torch.zeros(3, 1), torch.zeros(3, 1)),
        ("binary", torch.zeros(3, 2), torch.zeros(3)),
        ("classification", torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)),
        ("classification", torch.zeros(3, 2), torch.zeros(3, 3)),
        ("language_modeling", torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)),
        ("language_modeling", torch.zeros(3, 2, 4), torch.zeros(2, 3, dtype=torch.int64)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(task: str, logits: torch.Tensor, target: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="needs logits"):
        build_loss(ObjectiveSpec(), task)(logits, target)
