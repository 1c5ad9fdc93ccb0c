"""Runs a model on the lowest and highest codes that its rows can contain, so that none fails later.

Held-out rows and callers of an endpoint have categories and tokens that the first training rows do not have.
"""

import torch
from torch import Tensor, nn

from maas_ray.data.spec.features import UNKNOWN
from maas_ray.errors import ModelError
from maas_ray.row import Row

_EXACT = 256
"""Largest whole number up to which bfloat16 represents all."""
_MAX_SHOWN = 5


def extreme_rows(row: Row) -> Tensor | None:
    """The rows with the lowest and with the highest code in every place; None if rows contain no codes."""
    if row.vocab_size is not None:
        return torch.tensor([0, row.vocab_size - 1]).reshape(2, 1).expand(2, *row.shape).contiguous()
    ordinal = [one for one in row.columns if one.kind == "ordinal"]
    if not ordinal:
        return None
    rows = torch.zeros(2, *row.shape)
    for column in ordinal:
        rows[0, column.start] = 0 if column.has_unknown else UNKNOWN
        rows[1, column.start] = (column.cardinality or 1) - 1
    return rows


def refuse_out_of_range(net: nn.Module, row: Row) -> None:
    """Refuses a model that fails on a code of the data.

    Args:
        net: the whole model with its data on the CPU; its mode is unchanged.
        row: one preprocessed row.

    Raises:
        ModelError: with the embedding, the code and a fix.
    """
    rows = extreme_rows(row)
    if rows is None:
        return
    names = {module: name for name, module in net.named_modules()}
    handles = [
        module.register_forward_pre_hook(_Checked(names[module], row))
        for module in net.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    modes = {module: module.training for module in net.modules()}
    try:
        with torch.no_grad():
            net.eval()(rows)
    except ModelError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ModelError(
            f"{type(net).__name__} fails on the lowest or highest codes of the data ({_range(row)}): "
            f"{type(error).__name__}: {error}; {_fix(row)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, is_training in modes.items():
            module.training = is_training


def refuse_rounded_codes(row: Row) -> None:
    """Refuses codes that bfloat16, to which FSDP casts the rows of a sharded model, rounds.

    Raises:
        ModelError: an ordinal column has more codes.
    """
    for column in row.columns:
        if column.kind == "ordinal" and (column.cardinality or 0) > _EXACT:
            raise ModelError(
                f"column {column.name!r} has {column.cardinality} ordinal codes, but a sharded model with precision bf16 "
                f"gets its rows in bfloat16, which represents whole numbers up to {_EXACT}; use precision fp32, or a "
                "layout without dp_shard"
            )


class _Checked:
    """Checks the codes before a lookup, whose own error names neither the module nor the code."""

    def __init__(self, name: str, row: Row) -> None:
        self._name, self._row = name, row

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        codes, size = arguments[0], int(module.num_embeddings)  # type: ignore[arg-type]
        low, high = int(codes.min()), int(codes.max())
        if low >= 0 and high < size:
            return
        wrong = low if low < 0 else high
        raise ModelError(
            f"the embedding {self._name!r} of {size} rows gets the code {wrong}; codes must be in [0, {size}). The codes "
            f"of the data are {_range(self._row)}; {_fix(self._row)}"
        )


def _range(row: Row) -> str:
    if row.vocab_size is not None:
        return f"token ids in [0, {row.vocab_size})"
    ordinal = [one for one in row.columns if one.kind == "ordinal"]
    shown = [
        f"{one.name!r} in [{0 if one.has_unknown else UNKNOWN}, {one.cardinality})" for one in ordinal[:_MAX_SHOWN]
    ]
    more = f" and {len(ordinal) - _MAX_SHOWN} more columns" if len(ordinal) > _MAX_SHOWN else ""
    return ", ".join(shown) + more


def _fix(row: Row) -> str:
    if row.vocab_size is not None:
        return "declare `vocab_size` in the constructor, and give the embedding this number of rows"
    unknown = (
        f"set data.cleaning.categorical.unknown: code, so that an unknown category has a code of its own instead of "
        f"{UNKNOWN}, and "
        if not all(one.has_unknown for one in row.columns if one.kind == "ordinal")
        else ""
    )
    return (
        f"{unknown}declare `cardinalities` in the constructor, and give each embedding the number of rows of its column"
    )
