"""The masks of masked language modeling: a function of seed, row position and token index, not of rank or batch."""

from hashlib import shake_128

import numpy as np
from numpy.typing import NDArray

from maas_ray.data.loading.order import SPLITMIX64_STEP, mix
from maas_ray.data.stored.token_layout import MaskLayout

IGNORED = -100
_TAG = b"maas-ray masked tokens 1"
_STEP = np.uint64(SPLITMIX64_STEP)


def mask_tokens(
    layout: MaskLayout, vocab_size: int, seed: int, positions: NDArray[np.int64], token_ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Masks tokens as BERT does: of the chosen tokens 80 % become the mask, 10 % a random token, 10 % are unchanged.

    Integer arithmetic only, so that the masks are the same on every machine.

    Args:
        layout: the mask token and the fraction of tokens to predict.
        vocab_size: random token ids are below it.
        seed: in [0, 2**64).
        positions: int64 [B], positions of the rows in the endless stream.
        token_ids: int64 [B, T].

    Returns:
        The model's input and the target, both int64 [B, T]; the target is -100 where nothing is predicted.
    """
    key = np.frombuffer(shake_128(_TAG + seed.to_bytes(8, "little")).digest(8), dtype="<u8").astype(np.uint64)
    rows = mix(positions.astype(np.uint64), key)
    places = (np.arange(token_ids.shape[1], dtype=np.uint64) + np.uint64(1)) * _STEP
    choice = mix(rows[:, None], places[None, :])
    action = mix(choice, _STEP.reshape(1))
    drawn = mix(action, _STEP.reshape(1))
    is_chosen = _below(choice, layout.fraction)
    if layout.never:
        is_chosen &= ~np.isin(token_ids, layout.never)
    is_hidden = is_chosen & _below(action, 0.8)
    is_random = is_chosen & ~is_hidden & _below(action, 0.9)
    random_ids = ((drawn >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)
    seen = np.where(is_hidden, layout.code, np.where(is_random, random_ids.astype(np.int64), token_ids))
    return seen, np.where(is_chosen, token_ids, IGNORED)


def _below(bits: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    below: NDArray[np.bool_] = (bits >> np.uint64(11)) < np.uint64(round(share * (1 << 53)))
    return below
