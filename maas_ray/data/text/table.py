"""Prepares a data set of token rows from a table with a text and a target per row. Independent of Ray.

A text becomes one row: its first tokens, padded with the pad token.
"""

from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.sources.table import read_table
from maas_ray.data.sources.text import to_text
from maas_ray.data.spec.data import SPLITS, DataSpec
from maas_ray.data.spec.features import Features, TokensColumn
from maas_ray.data.spec.text import TextSpec
from maas_ray.data.stored.dataset import TARGET, WEIGHT, Dataset, save_dataset
from maas_ray.data.table.rare_classes import count_merged, find_rare, merge_rare
from maas_ray.data.table.split import assign_table
from maas_ray.data.table.split_rules import count_keys
from maas_ray.data.table.target import cast_target, class_names, encode_target, scale_target
from maas_ray.data.table.weight import read_weight
from maas_ray.data.text.learning import find_tokenizer
from maas_ray.decoding.tokenizer import encode_rows
from maas_ray.errors import DataError
from maas_ray.store.objects import ObjectStore


def prepare_labelled_texts(spec: DataSpec, text: TextSpec, store: ObjectStore) -> Dataset:
    """Prepares texts with a target, or opens the data set if the same content was prepared before.

    The report counts `rows_read`, `rows_dropped` (`target_missing`, `value_missing`: no text) and `texts_cut`.

    Raises:
        DataError: the table cannot be read or split, or does not fit the tokenizer.
    """
    raw = read_table(spec.model_copy(update={"features": (text.field,)})).table
    target = cast_target(spec.target, raw.column(spec.target), spec.task)
    rare = find_rare(spec, count_keys(target.values)) if spec.rare_classes is not None else frozenset()
    num_merged, target = count_merged(target, rare), merge_rare(spec, target, rare)
    texts = to_text(text.field, raw.column(text.field))
    is_empty = np.asarray(pc.equal(texts, "").to_numpy(zero_copy_only=False))
    kept = ~target.missing & ~is_empty
    assigned = assign_table(spec, raw)
    rows = {split: np.flatnonzero(kept & (assigned == code)) for code, split in enumerate(SPLITS)}
    for split in SPLITS:
        if not len(rows[split]) and (split == "train" or (assigned == SPLITS.index(split)).any()):
            raise DataError(
                f"the {split} split of {spec.uri} has no row with a text and a target; add rows, or change data.split"
            )
    by_split = {split: texts.take(pa.array(rows[split])).to_pylist() for split in SPLITS}
    own = text.tokenizer
    tokenizer = find_tokenizer(
        spec, text, lambda: ((split, one) for split in SPLITS for one in by_split[split]), [own.pad]
    )
    pad = tokenizer.token_id(own.pad, "pad")
    weight = read_weight(spec, raw, rows["train"])
    targets = {split: target.values.take(pa.array(rows[split])) for split in SPLITS}
    labels = (
        None
        if spec.task == "regression"
        else class_names(spec.target, targets["train"], spec.task, spec.positive_class)
    )
    tables, num_cut = {}, 0
    for split in SPLITS:
        tokens, lengths = encode_rows(tokenizer, by_split[split], text.seq_len, pad)
        field, array = tensor_field(text.field, tokens)
        codes = encode_target(spec.target, targets[split], labels, split)
        encoded = codes.astype(np.float32) if spec.task == "binary" else codes
        table = pa.table([array], schema=pa.schema([field]))
        tables[split] = table.append_column(TARGET, pa.array(encoded))
        if weight is not None:
            tables[split] = tables[split].append_column(WEIGHT, weight.take(pa.array(rows[split])))
        num_cut += int((lengths > text.seq_len).sum())
    column = TokensColumn(
        name=text.field,
        length=text.seq_len,
        vocab_size=tokenizer.vocab_size,
        pad=pad,
        tokenizer=sha256(tokenizer.content).hexdigest(),
    )
    num_without_target = int(target.missing.sum())
    report = {
        "rows_read": raw.num_rows,
        "rows_dropped": {
            "target_missing": num_without_target,
            "value_missing": raw.num_rows - num_without_target - int(kept.sum()),
        },
        "texts_cut": num_cut,
    }
    if spec.rare_classes is not None:
        report["rare_classes"] = num_merged
    features = Features(
        columns=(column,),
        task=spec.task,
        target=spec.target,
        weight=spec.weight,
        labels=labels,
        target_scaling=scale_target(targets["train"].to_numpy(), spec.target_scaling)
        if spec.task == "regression"
        else None,
    )
    source = {"uri": spec.uri, "spec_digest": spec.digest()}
    return save_dataset(store, tables, features, report, source, tokenizer.content)
