"""Augmentation is a function of seed, sample and epoch: the same on every layout, and after a resume."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from maas_ray.data.loading.augment import AugmentedRows, augment, beta
from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.rows import Batch, Rows, Table
from maas_ray.data.spec.augmentation import AugmentationSpec, refuse_augmentation
from maas_ray.data.spec.features import Column, Features, NumericColumn, TensorColumn
from maas_ray.errors import SpecError
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.spec.optim import ObjectiveSpec

NUM_ROWS, SHAPE = 23, (3, 6, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, *SHAPE)).astype(np.uint8)
TARGET = np.arange(NUM_ROWS, dtype=np.int64) % 4
ALL = AugmentationSpec(flip=0.5, crop=2, brightness=0.4, contrast=0.4, saturation=0.4, mixup=0.4)


def _features(task: str = "classification", column: Column | None = None) -> Features:
    column = column or TensorColumn(name="image", datatype="UINT8", shape=SHAPE)
    labels = None if task == "regression" else ("a", "b", "c", "d")
    return Features.model_validate({"columns": (column,), "task": task, "target": "y", "labels": labels})


def _rows(spec: AugmentationSpec = ALL, seed: int = 0, task: str = "classification") -> AugmentedRows:
    target = TARGET if task == "classification" else TARGET.astype(np.float32)
    return AugmentedRows(Table([PIXELS], target), spec, _features(task), seed)


def _seen(rows: Rows, world: int, accumulation: int = 1, start: int = 0) -> dict[int, tuple[bytes, bytes]]:
    """The image and the target at each position of two epochs, as the ranks of a layout load them."""
    seen = {}
    for rank in range(world):
        loader = Loader.over(rows, seed=5, global_batch=8, rank=rank, world=world, accumulation_steps=accumulation)
        for cursor in range(start, 2 * NUM_ROWS, 8):
            for batch in loader.load(cursor, 2 * NUM_ROWS):
                for place, image, target in zip(batch.positions, batch.columns[0], batch.target, strict=True):
                    seen[int(place)] = image.numpy().tobytes(), target.numpy().tobytes()
    return seen


def _is_independent_of_the_layout(make: Callable[[int], Rows]) -> bool:
    """Whether 1, 2 and 3 ranks, micro-batches and a resume see the same images; `make` gets the number of ranks."""
    alone = _seen(make(1), 1)
    layouts = [_seen(make(2), 2), _seen(make(3), 3, accumulation=2), _seen(make(1), 1, start=16)]
    return all({place: alone[place] for place in other} == other for other in layouts)


def test_every_layout_and_a_resume_see_the_same_images() -> None:
    assert _is_independent_of_the_layout(lambda world: _rows())


class TiedToTheRank(AugmentedRows):
    """The planted fault: a sample's randomness depends on its place in the batch of a rank."""

    def _counters(self, ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
        return super()._counters(np.arange(len(ids)), epochs)


def test_an_augmentation_that_is_tied_to_the_rank_is_detected() -> None:
    assert not _is_independent_of_the_layout(
        lambda world: TiedToTheRank(Table([PIXELS], TARGET), ALL, _features(), seed=0)
    )


def test_epochs_and_seeds_differ() -> None:
    ids = np.arange(NUM_ROWS)
    first, second, other = (
        rows.take(ids, ids + shift).columns[0]
        for rows, shift in ((_rows(), 0), (_rows(), NUM_ROWS), (_rows(seed=1), 0))
    )
    for one in (second, other):
        assert (first != one).flatten(1).any(dim=1).float().mean() > 0.9


def _counters(number: int = 20_000) -> NDArray[np.uint64]:
    return np.random.default_rng(1).integers(0, 2**63, number).astype(np.uint64)


def test_flips_and_crops_move_pixels_only() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(1, 1, 6, 8).repeat(400, axis=0)
    flipped = augment(image, AugmentationSpec(flip=0.25), _counters(400))
    is_flipped = (flipped == image[..., ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == image).all(axis=(1, 2, 3)) ^ is_flipped).all()
    assert 0.15 < is_flipped.mean() < 0.35
    assert (augment(image, AugmentationSpec(flip=1.0), _counters(400)) == image[..., ::-1]).all()
    padded = np.pad(image[0, 0], 2, mode="reflect")
    windows = {padded[y : y + 6, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    cropped = augment(image, AugmentationSpec(crop=2), _counters(400))
    assert {one.tobytes() for one in cropped} == windows


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colors_change_as_far_as_the_spec_allows(name: str) -> None:
    image = np.full((1000, 3, 2, 2), 100, np.uint8)
    image[:, 0] = 120
    image[:, :, 0] //= 2
    found = augment(image, AugmentationSpec.model_validate({name: 0.2}), _counters(1000))
    gray = (image * np.float32([0.299, 0.587, 0.114])[None, :, None, None]).sum(axis=1, keepdims=True)
    center = {"brightness": 0, "contrast": image.mean(), "saturation": gray}[name]
    factor = ((found - center) / (image - center)).reshape(1000, -1)
    assert found.dtype == np.float32
    assert (np.ptp(factor, axis=1) < 1e-3).all()
    assert factor.min() == pytest.approx(0.8, abs=0.01)
    assert factor.max() == pytest.approx(1.2, abs=0.01)


@pytest.mark.parametrize("parameter", [0.1, 0.4, 1.0])
def test_shares_have_the_moments_of_the_beta_distribution(parameter: float) -> None:
    shares = beta(parameter, _counters())
    assert ((shares > 0) & (shares <= 1)).all()
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * parameter + 1)), abs=0.01)


def test_mixed_images_have_the_loss_of_both_targets() -> None:
    ids = np.arange(NUM_ROWS)
    batch = _rows(AugmentationSpec(mixup=0.4)).take(ids, ids)
    assert batch.target.shape == (NUM_ROWS, 4)
    torch.testing.assert_close(batch.target.sum(dim=1), torch.ones(NUM_ROWS))
    logits = torch.randn(NUM_ROWS, 4, generator=torch.Generator().manual_seed(0))
    loss = build_loss(ObjectiveSpec(label_smoothing=0.1), "classification")
    parts = sum(batch.target[:, code] * loss(logits, torch.full((NUM_ROWS,), code)) for code in range(4))
    torch.testing.assert_close(loss(logits, batch.target), parts)
    numbers = _rows(AugmentationSpec(mixup=0.4), task="regression").take(ids, ids)
    share = (batch.target * torch.arange(4)).sum(dim=1)
    torch.testing.assert_close(numbers.target, share)


@pytest.mark.parametrize(
    ("spec", "column", "says"),
    [
        ({"flip": 0.5}, NumericColumn(name="x"), "the rows are no images"),
        ({"flip": 0.5}, TensorColumn(name="x", shape=(8, 8)), "the rows are no images"),
        ({"flip": 0.5}, TensorColumn(name="x", shape=(2, 8, 8)), "images of 2 channels"),
        ({"crop": 5}, TensorColumn(name="x", shape=(1, 8, 8)), "the limit is 4"),
        ({"contrast": 0.5}, TensorColumn(name="x", shape=(3, 8, 8)), "need images of bytes"),
        ({"saturation": 0.5}, TensorColumn(name="x", datatype="UINT8", shape=(1, 8, 8)), "the images are gray"),
    ],
)
def test_what_has_no_meaning_is_refused(spec: dict[str, Any], column: Column, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        refuse_augmentation(AugmentationSpec.model_validate(spec), _features(column=column))


def test_batches_without_rows_stay_empty() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert isinstance(_rows().take(nothing, nothing), Batch)
