"""Losses, metrics and optimizers by import path: what fits, and what is refused before the first step."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from maas_ray.errors import ModelError, SpecError
from maas_ray.spec import parse_spec
from maas_ray.train.custom.loss import CustomLoss, check_loss
from maas_ray.train.custom.metrics import CustomMetrics, check_metrics
from maas_ray.train.loop.auxiliary import AuxiliaryLosses, split_output
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.optim.check import check_optimizer
from maas_ray.train.spec.metrics import MetricSpec
from maas_ray.train.spec.optim import ObjectiveSpec, OptimizerSpec

PARTS = "tests.support.custom_parts"
TARGET = torch.tensor([0, 3, 1, 2, 3, 3])
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def _loss(name: str, task: str = "classification", **params: object) -> CustomLoss:
    loss = build_loss(ObjectiveSpec(loss=name if ":" in name else f"{PARTS}:{name}", params=params), task)
    assert isinstance(loss, CustomLoss)
    return loss


def test_a_class_and_a_function_give_the_loss_of_each_row() -> None:
    tuned = _loss("TunedLoss", power=2.0)
    torch.testing.assert_close(
        tuned(LOGITS, TARGET), functional.cross_entropy(LOGITS, TARGET, reduction="none") ** 2 / 2
    )
    check_loss(tuned, LOGITS, TARGET)
    numbers = torch.randn(6)
    absolute = _loss("absolute", "regression", scale=2.0)
    torch.testing.assert_close(absolute(LOGITS[:, :1], numbers), 2 * (LOGITS[:, 0] - numbers).abs())
    check_loss(absolute, LOGITS[:, :1], numbers)
    theirs = _loss("torch.nn:SmoothL1Loss", "regression", reduction="none")
    check_loss(theirs, LOGITS[:, :1], numbers)


def test_for_tokens_a_row_is_one_counted_token() -> None:
    logits, target = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[1, -100, 3], [-100, -100, -100]])
    custom = _loss("torch.nn:CrossEntropyLoss", "language_modeling", reduction="none")
    built_in = build_loss(ObjectiveSpec(), "language_modeling")
    torch.testing.assert_close(custom(logits, target), built_in(logits, target))
    custom(logits, torch.full_like(target, -100)).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TunedLos", "has no attribute 'TunedLos'; did you mean 'TunedLoss'?"),
        ("mean_of_batch", r"returns a tensor \[\] for logits .*return the loss of each row, \[6\]"),
        ("centered", "depend on which rows are in the batch"),
        ("detached", "does not depend on the logits"),
        ("infinite", "it must be finite"),
        ("of_one_argument", "cannot be called with 2 arguments"),
        ("WithCenters", "has parameters, which the optimizer does not train"),
        ("Counts", "changes its buffers"),
        ("PARTS", "has no attribute 'PARTS'"),
        ("nowhere.at_all:Loss", "cannot be imported"),
    ],
)
def test_a_loss_that_would_not_train_is_refused(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"objective.loss: .*{message}"):
        check_loss(_loss(name), LOGITS, TARGET)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"loss": "focl"}, "unknown loss 'focl'; did you mean 'focal'?"),
        ({"loss": "mse", "params": {"a": 1}}, "mse has no params"),
        ({"loss": f"{PARTS}:centered", "label_smoothing": 0.1}, "label_smoothing 0.1 would have no effect"),
        ({"focal_gamma": 1.0}, "the default loss has no option focal_gamma"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(document: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(ObjectiveSpec, document)


def test_focal_loss_is_the_cross_entropy_times_a_power_of_the_error() -> None:
    share = LOGITS.softmax(1)[torch.arange(6), TARGET]
    losses = build_loss(ObjectiveSpec(loss="focal", focal_gamma=1.5), "classification")(LOGITS, TARGET)
    torch.testing.assert_close(losses, -((1 - share) ** 1.5) * share.log())
    binary = build_loss(ObjectiveSpec(loss="focal"), "binary")(LOGITS[:, :1], torch.zeros(6))
    torch.testing.assert_close(binary, -(LOGITS[:, 0].sigmoid() ** 2) * functional.logsigmoid(-LOGITS[:, 0]))
    none = build_loss(ObjectiveSpec(loss="focal", focal_gamma=0.0), "classification")
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    none(sure, torch.tensor([0])).sum().backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_metrics_are_computed_over_all_rows() -> None:
    specs = [
        MetricSpec(name=f"{PARTS}:Misses"),
        MetricSpec(name=f"{PARTS}:is_right", key="right"),
        MetricSpec(name="torchmetrics.classification:MulticlassMatthewsCorrCoef", params={"num_classes": 4}),
    ]
    metrics = CustomMetrics(specs)
    for _ in range(2):
        metrics.begin(torch.device("cpu"))
        for rows in (slice(0, 1), slice(1, 6)):
            metrics.update(LOGITS[rows], TARGET[rows])
        found = metrics.compute()
    wrong = int((LOGITS.argmax(1) != TARGET).sum())
    assert found.keys() == {"misses", "right", "multiclass_matthews_corr_coef"}
    assert (found["misses"], found["right"]) == (wrong, pytest.approx(1 - wrong / 6))
    metrics.refuse_direction("misses", "min", "checkpoint")
    with pytest.raises(SpecError, match=r"checkpoint.mode: smaller values of .*Misses are better; set mode to min"):
        metrics.refuse_direction("misses", "max", "checkpoint")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("overall", {}, r"overall returns a tensor \[\] .*write a torchmetrics.Metric"),
        ("WithCenters", {}, "name a subclass of torchmetrics.Metric or a function"),
        ("Misses", {"a": 1}, r"Misses\(a=1\) failed: TypeError"),
        ("is_rigth", {}, "did you mean 'is_right'"),
    ],
)
def test_a_metric_that_cannot_be_combined_over_batches_is_refused(name: str, params: dict, message: str) -> None:
    with pytest.raises(SpecError, match=f"metrics.*{message}"):
        check_metrics(CustomMetrics([MetricSpec(name=f"{PARTS}:{name}", params=params)]), LOGITS, TARGET)
    with pytest.raises(SpecError, match="unknown metric 'mcc'; built-in names: none"):
        parse_spec(MetricSpec, {"name": "mcc"})


NET = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        (f"{PARTS}:Momentum", {"decay": 0.8}),
        ("torch.optim:NAdam", {}),
        ("torch.optim:Adafactor", {}),
        ("torch.optim:Adagrad", {}),
        ("torch.optim:Rprop", {}),
        ("schedulefree:AdamWScheduleFree", {"warmup_steps": 2}),
        ("schedulefree:SGDScheduleFree", {}),
        ("schedulefree:RAdamScheduleFree", {}),
    ],
)
def test_an_optimizer_of_others_continues_exactly_from_its_state(name: str, params: dict) -> None:
    check_optimizer(OptimizerSpec(name=name, params=params, lr=0.05), NET)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (f"{PARTS}:Forgets", {}, "does not continue exactly from its saved state"),
        (f"{PARTS}:KeepsAList", {}, r"keeps a list as state\['past'\]"),
        (f"{PARTS}:StandsStill", {}, "does not change a weight of 1 dimension"),
        (f"{PARTS}:Switches", {}, r"changes its state in eval\(\) or train\(\)"),
        (f"{PARTS}:Momentun", {}, "did you mean 'Momentum'"),
        (f"{PARTS}:Falls", {}, "not a subclass of torch.optim.Optimizer"),
        (f"{PARTS}:Momentum", {"params": {"lr": 1}}, "optimizer.params: lr is set by the spec"),
        (f"{PARTS}:Momentum", {"params": {"beta": 1}}, r"Momentum\(beta=1, lr=0.001\) failed"),
        (f"{PARTS}:Forgets", {"weight_decay": 0.1}, "optimizer.weight_decay: 0.1 would have no effect"),
        ("torch.optim:LBFGS", {}, "LBFGS"),
    ],
)
def test_an_optimizer_that_cannot_be_resumed_is_refused(name: str, changes: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_optimizer(OptimizerSpec(name=name, **changes), NET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 0.9}, "has no option momentum; remove it, or use params"),
        ({"implementation": "fused"}, "implementation would have no effect|has no fused"),
    ],
)
def test_fields_of_built_in_optimizers_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(OptimizerSpec, {"name": f"{PARTS}:Momentum", **changes})


def test_auxiliary_losses_are_weighted_by_the_rows_of_the_global_batch() -> None:
    losses = AuxiliaryLosses({"a": 0.5, "b": 2.0}, torch.device("cpu"))
    losses.begin(4)
    total = torch.zeros(())
    for rows in (slice(0, 3), slice(3, 4)):
        values = {"a": torch.tensor([1.0, 2, 3, 4])[rows], "b": torch.tensor([1.0, 1, 1, 5])[rows]}
        logits, share = losses.split((LOGITS[:4][rows], values), len(values["a"]))
        total += share
    assert logits.shape == (1, 4)
    assert losses.means(1) == {"a": 2.5, "b": 2.0}
    assert float(total) == 0.5 * 2.5 + 2.0 * 2.0


@pytest.mark.parametrize(
    ("output", "weights", "message"),
    [
        (
            (LOGITS, {"a": torch.zeros(6)}),
            {},
            "with objective.auxiliary empty it must return the logits|has weights of none",
        ),
        (LOGITS, {"a": 1.0}, r"returns a Tensor in training mode; .* a it must return \(logits"),
        (
            (LOGITS, {"b": torch.zeros(6)}),
            {"a": 1.0},
            "returns the auxiliary losses b, but objective.auxiliary has weights of a",
        ),
        (
            (LOGITS, {"a": torch.zeros(())}),
            {"a": 1.0},
            r"has the shape \[\]; it must have one value for each row, \[6\]",
        ),
    ],
)
def test_auxiliary_losses_that_differ_from_the_spec_are_refused(output: object, weights: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        split_output(output, weights)
