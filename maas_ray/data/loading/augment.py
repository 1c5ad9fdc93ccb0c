"""Augments the images of training batches: a function of seed, sample and epoch, not of rank, batch or resume.

Random numbers are counters that are mixed (SplitMix64), as in the sample order: no generator has a state.
"""

from hashlib import shake_128
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maas_ray.data.loading.order import SPLITMIX64_STEP, mix
from maas_ray.data.loading.rows import Batch, Rows
from maas_ray.data.spec.augmentation import AugmentationSpec, refuse_augmentation
from maas_ray.data.spec.features import Features

_TAG = b"maas-ray augmentation 1"
_STEP = np.uint64(SPLITMIX64_STEP)
_FLIP, _X, _Y, _BRIGHTNESS, _CONTRAST, _SATURATION, _PARTNER, _SHARE = range(8)
_TRIES = 64
"""Pairs that are drawn for a number of the beta distribution; at least half of them are accepted."""
_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma of ITU-R BT.601, as in Pillow."""


class AugmentedRows:
    """The rows of a training split whose images are augmented.

    Args:
        rows: the rows.
        spec: the augmentation.
        features: their only column is an image, see `refuse_augmentation`.
        seed: in [0, 2**64).
    """

    def __init__(self, rows: Rows, spec: AugmentationSpec, features: Features, seed: int) -> None:
        refuse_augmentation(spec, features)
        self._rows = rows
        self._spec = spec
        self._num_classes = features.num_outputs if features.task == "classification" else 0
        key = np.frombuffer(shake_128(_TAG + seed.to_bytes(8, "little")).digest(8), dtype="<u8")
        self._key = key.astype(np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
        batch = self._rows.take(ids, positions)
        if not len(ids):
            return batch
        epochs = positions // len(self)
        counters = self._counters(ids, epochs)
        images = self._augmented(batch, counters)
        if not self._spec.mixup:
            return Batch([torch.from_numpy(images)], batch.target, batch.positions, batch.weight)
        partners = (_bits(counters, _PARTNER) % np.uint64(len(self))).astype(np.int64)
        other = self._rows.take(partners, positions)
        others = self._augmented(other, self._counters(partners, epochs))
        share = beta(self._spec.mixup, counters)
        spread = share.reshape(-1, *[1] * (images.ndim - 1)).astype(np.float32)
        mixed = spread * images.astype(np.float32) + (1 - spread) * others.astype(np.float32)
        target = self._mixed_target(batch, other, torch.from_numpy(share))
        return Batch([torch.from_numpy(mixed)], target, batch.positions, batch.weight)

    def _counters(self, ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """One number for each sample and epoch, [B]."""
        return mix(ids.astype(np.uint64), mix(epochs.astype(np.uint64), self._key))

    def _augmented(self, batch: Batch, counters: NDArray[np.uint64]) -> NDArray[Any]:
        return augment(batch.columns[0].numpy(), self._spec, counters)

    def _mixed_target(self, batch: Batch, other: Batch, share: torch.Tensor) -> torch.Tensor:
        """Probabilities float32 [B, classes], or numbers float32 [B]."""
        first, second = batch.target, other.target
        if self._num_classes:
            first, second = (
                torch.nn.functional.one_hot(target, self._num_classes).to(torch.float64) for target in (first, second)
            )
            share = share[:, None]
        return (share * first + (1 - share) * second).to(torch.float32)


def augment(images: NDArray[Any], spec: AugmentationSpec, counters: NDArray[np.uint64]) -> NDArray[Any]:
    """Augments images, without mixup.

    Args:
        images: [B, channels, height, width].
        spec: the augmentation.
        counters: uint64 [B], one for each image, which decide everything random.

    Returns:
        The same shape; float32 if values of pixels change, else the same type.
    """
    height, width = images.shape[2:]
    rows, columns = np.arange(height)[None, :], np.arange(width)[None, :]
    if spec.flip:
        flipped = _uniform(counters, _FLIP) < spec.flip
        columns = np.where(flipped[:, None], width - 1 - columns, columns)
    if spec.crop:
        sizes = np.uint64(2 * spec.crop + 1)
        rows, columns = (
            _mirrored(places + (_bits(counters, draw) % sizes).astype(np.int64)[:, None] - spec.crop, size)
            for places, draw, size in ((rows, _Y, height), (columns, _X, width))
        )
    if spec.flip or spec.crop:
        batch, channel = np.arange(len(images))[:, None, None, None], np.arange(images.shape[1])[None, :, None, None]
        images = images[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return _colored(images, spec, counters) if spec.has_color else np.ascontiguousarray(images)


def beta(parameter: float, counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number of the beta distribution with two equal parameters, in (0, 1], for each counter.

    Source: Jöhnk 1964: for uniform u and v, and x = u^(1/a) and y = v^(1/a), x / (x + y) has this distribution if
    x + y <= 1.
    """
    result = np.full(len(counters), 0.5)
    waiting = np.ones(len(counters), dtype=bool)
    for attempt in range(_TRIES):
        x, y = (_open(counters, 8 + 2 * attempt + side) ** (1 / parameter) for side in (0, 1))
        total = x + y
        accepted = waiting & (total <= 1) & (total > 0)
        result[accepted] = (x / np.where(total > 0, total, 1))[accepted]
        waiting &= ~accepted
        if not waiting.any():
            break
    return result


def _colored(images: NDArray[Any], spec: AugmentationSpec, counters: NDArray[np.uint64]) -> NDArray[np.float32]:
    pixels = images.astype(np.float32)
    if spec.brightness:
        pixels *= _factor(spec.brightness, counters, _BRIGHTNESS)
    if spec.contrast:
        mean = pixels.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
        pixels = mean + (pixels - mean) * _factor(spec.contrast, counters, _CONTRAST)
    if spec.saturation:
        gray = np.einsum("bchw,c->bhw", pixels, _GRAY)[:, None]
        pixels = gray + (pixels - gray) * _factor(spec.saturation, counters, _SATURATION)
    return pixels.clip(0, 255)


def _factor(strength: float, counters: NDArray[np.uint64], draw: int) -> NDArray[np.float32]:
    factor = 1 + strength * (2 * _uniform(counters, draw) - 1)
    return factor.astype(np.float32).reshape(-1, 1, 1, 1)


def _mirrored(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Places beyond the edge, mirrored at it; the edge itself is not repeated unless there is one pixel."""
    if size == 1:
        return np.zeros_like(places)
    places = np.abs(places)
    return np.where(places >= size, 2 * (size - 1) - places, places)


def _bits(counters: NDArray[np.uint64], draw: int) -> NDArray[np.uint64]:
    """Draw number `draw` of each counter: 64 bits."""
    return mix(counters, np.array([draw + 1], dtype=np.uint64) * _STEP)


def _uniform(counters: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """In [0, 1), with 53 bits."""
    return (_bits(counters, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _open(counters: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """In (0, 1)."""
    return ((_bits(counters, draw) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
