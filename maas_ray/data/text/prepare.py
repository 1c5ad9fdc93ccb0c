"""Prepares a data set of packed token ids from texts: survey, learn the tokenizer, encode, commit.

The texts are read three times, in pieces, so that memory does not grow with them; the token ids are buffered in a file.
Large texts are encoded in Ray tasks, if Ray is connected; the token ids are the same.
"""

import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from typing import IO, Any

import numpy as np
import ray
from numpy.typing import NDArray

from maas_ray.data.spec.data import SPLITS, DataSpec
from maas_ray.data.spec.features import Features, TokensColumn
from maas_ray.data.spec.text import TextSpec
from maas_ray.data.stored.dataset import MAX_PART_BYTES, TOKENIZER, Dataset, commit_dataset
from maas_ray.data.stored.token_layout import DATATYPES, Datatype, MaskLayout, TokenLayout
from maas_ray.data.table.column_statistics import CPU_TIMEOUT_S, require_cpu
from maas_ray.data.table.split import assign_rows
from maas_ray.data.text.encoding import encode_in_tasks
from maas_ray.data.text.learning import find_tokenizer
from maas_ray.data.text.source import TextPiece, read_pieces
from maas_ray.decoding.tokenizer import Tokenizer
from maas_ray.errors import DataError
from maas_ray.store.objects import ObjectStore

COLUMN = "tokens"
TASKS_FROM = 1 << 25
"""Minimum characters for encoding in tasks; fewer are encoded before the first task has started."""
_PIECES_AT_ONCE = 16
"""Pieces that are encoded together, by all CPUs; the library needs about a hundred bytes per token for this."""


@dataclass(frozen=True)
class _Survey:
    """Size of the texts, and position of each split in them."""

    num_documents: int
    num_characters: int
    ends: tuple[int, ...]
    """Split by position: the character at which each split ends."""
    of_document: NDArray[np.int8] | None
    """Split by document: the index of each document's split in `SPLITS`."""


def prepare_text(spec: DataSpec, text: TextSpec, store: ObjectStore, cpu_timeout_s: float = CPU_TIMEOUT_S) -> Dataset:
    """Prepares the data set of a token task, or opens it if the same content was prepared before.

    The report counts `documents`, and per split `characters` and `tokens`.

    Args:
        spec: data specification.
        text: text specification.
        store: where to commit.
        cpu_timeout_s: longest wait for a free CPU of the Ray cluster, if tasks encode.

    Raises:
        DataError: the texts cannot be read, are too few for a row of each split, or do not fit the tokenizer.
        ClusterError: no CPU became free in time, or a task failed.
    """
    survey = _survey(spec, text)
    tokenizer = _tokenizer(spec, text, survey)
    end = tokenizer.token_id(text.tokenizer.end_of_text, "end_of_text") if survey.num_documents > 1 else None
    with ExitStack() as stack:
        try:
            streams = {split: _Stream(stack.enter_context(tempfile.TemporaryFile()), tokenizer) for split in SPLITS}
            in_tasks = survey.num_characters >= TASKS_FROM and not tokenizer.is_fast and ray.is_initialized()
            if in_tasks:
                require_cpu(cpu_timeout_s)
            _encode(_split_pieces(spec, text, survey), tokenizer, end, streams, in_tasks)
        except OSError as error:
            raise DataError(
                f"cannot store the tokens in {tempfile.gettempdir()}: {error}; set TMPDIR to a folder with enough free "
                "space"
            ) from error
        layout = _layout(spec, text, tokenizer, end, {split: stream.num_tokens for split, stream in streams.items()})
        _refuse_short(spec, layout)
        column = TokensColumn(
            name=COLUMN,
            length=text.seq_len,
            vocab_size=tokenizer.vocab_size,
            tokenizer=sha256(tokenizer.content).hexdigest(),
        )
        report = {
            "documents": survey.num_documents,
            "characters": {split: stream.num_characters for split, stream in streams.items()},
            "tokens": layout.num_tokens,
        }
        return commit_dataset(
            store,
            {
                "num_rows": {split: layout.num_rows(split) for split in SPLITS},
                "report": report,
                "tokens": layout.model_dump(mode="json"),
            },
            Features(columns=(column,), task=spec.task, target=COLUMN),
            {split: stream.sum.hexdigest() for split, stream in streams.items()},
            {"source": {"uri": spec.uri, "spec_digest": spec.digest()}},
            chain([(TOKENIZER, tokenizer.content)], _parts(streams, layout.part_tokens)),
        )


class _Stream:
    """The token ids of one split, in a file."""

    def __init__(self, file: IO[bytes], tokenizer: Tokenizer) -> None:
        self.datatype = np.dtype(DATATYPES[_datatype(tokenizer)])
        self.num_tokens = self.num_characters = 0
        self.sum = sha256()
        self._file = file

    def add(self, text: str, token_ids: NDArray[Any], end: int | None) -> None:
        """Appends the token ids of `text`, and `end` unless it is None."""
        content = token_ids.astype(self.datatype).tobytes()
        if end is not None:
            content += np.array(end, dtype=self.datatype).tobytes()
        self._file.write(content)
        self.sum.update(content)
        self.num_tokens += len(content) // self.datatype.itemsize
        self.num_characters += len(text)

    def parts(self, part_tokens: int) -> Iterator[bytes]:
        """The whole stream, in parts of `part_tokens` tokens."""
        self._file.seek(0)
        while part := self._file.read(part_tokens * self.datatype.itemsize):
            yield part


def _encode(
    pieces: Iterator[tuple[str, TextPiece]],
    tokenizer: Tokenizer,
    end: int | None,
    streams: Mapping[str, _Stream],
    in_tasks: bool,
) -> None:
    waiting: deque[tuple[str, TextPiece]] = deque()

    def texts() -> Iterator[str]:
        for split, piece in pieces:
            waiting.append((split, piece))
            yield piece.text

    if in_tasks:
        token_ids: Iterator[NDArray[Any]] = encode_in_tasks(texts(), tokenizer, DATATYPES[_datatype(tokenizer)])
    else:
        token_ids = encode_here(texts(), tokenizer)
    for found in token_ids:
        split, piece = waiting.popleft()
        streams[split].add(piece.text, found, end if piece.ends_document else None)


def encode_here(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    """Token ids of each text, encoded in this process."""
    while batch := list(islice(texts, _PIECES_AT_ONCE)):
        yield from tokenizer.encode(batch)


def _survey(spec: DataSpec, text: TextSpec) -> _Survey:
    num_documents = num_characters = 0
    for piece in read_pieces(spec, text):
        num_documents += piece.ends_document
        num_characters += len(piece.text)
    if not num_characters:
        raise DataError(f"{spec.uri} contains no text; check data.uri and data.text.field")
    of_document = assign_rows(spec.split, num_documents) if text.split_by == "document" else None
    # nanoGPT's rule: the training split ends at int(n * 0.9).
    ends = (
        int(num_characters * (1 - (spec.split.validation + spec.split.test))),
        int(num_characters * (1 - spec.split.test)),
        num_characters,
    )
    return _Survey(num_documents, num_characters, ends, of_document)


def _split_pieces(spec: DataSpec, text: TextSpec, survey: _Survey) -> Iterator[tuple[str, TextPiece]]:
    """Every piece with its split; a piece that crosses a split boundary is cut there."""
    document, place = 0, 0
    for piece in read_pieces(spec, text):
        if place + len(piece.text) > survey.num_characters or document >= survey.num_documents:
            raise DataError(f"{spec.uri} grew while it was being read; prepare it again once its files are complete")
        if survey.of_document is not None:
            yield SPLITS[survey.of_document[document]], piece
        else:
            first = place
            for split, end in zip(SPLITS, survey.ends, strict=True):
                stop = min(end, place + len(piece.text))
                is_last = stop == place + len(piece.text)
                if first < stop or (is_last and not piece.text):
                    yield split, TextPiece(piece.text[first - place : stop - place], piece.ends_document and is_last)
                    first = stop
                if is_last:
                    break
        place += len(piece.text)
        document += piece.ends_document
    if (document, place) != (survey.num_documents, survey.num_characters):
        raise DataError(f"{spec.uri} shrank while it was being read; prepare it again once its files are complete")


def _tokenizer(spec: DataSpec, text: TextSpec, survey: _Survey) -> Tokenizer:
    special = [text.tokenizer.end_of_text] if survey.num_documents > 1 else []
    if spec.task == "masked_language_modeling":
        special.append(text.tokenizer.mask)

    def texts() -> Iterator[tuple[str, str]]:
        return ((split, piece.text) for split, piece in _split_pieces(spec, text, survey))

    return find_tokenizer(spec, text, texts, special)


def _layout(
    spec: DataSpec, text: TextSpec, tokenizer: Tokenizer, end: int | None, num_tokens: dict[str, int]
) -> TokenLayout:
    mask = None
    if spec.task == "masked_language_modeling":
        never = () if end is None else (end,)
        token_id = tokenizer.token_id(text.tokenizer.mask, "mask")
        mask = MaskLayout(fraction=text.mask_fraction, code=token_id, never=never)
    datatype = _datatype(tokenizer)
    return TokenLayout(
        datatype=datatype,
        num_tokens=num_tokens,
        part_tokens=MAX_PART_BYTES // np.dtype(DATATYPES[datatype]).itemsize,
        length=text.seq_len,
        strides={split: (text.stride or text.seq_len) if split == "train" else text.seq_len for split in SPLITS},
        mask=mask,
    )


def _datatype(tokenizer: Tokenizer) -> Datatype:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _refuse_short(spec: DataSpec, layout: TokenLayout) -> None:
    wanted = {"train": 1.0, "validation": spec.split.validation, "test": spec.split.test}
    for split, share in wanted.items():
        if share and not layout.num_rows(split):
            raise DataError(
                f"the {split} split of {spec.uri} has {layout.num_tokens[split]} tokens; a row needs {layout.width}; "
                f"add text, lower data.text.seq_len, or change data.split"
            )


def _parts(streams: Mapping[str, _Stream], part_tokens: int) -> Iterator[tuple[str, bytes]]:
    for split, stream in streams.items():
        yield from ((f"{split}/{i:05d}.tokens", part) for i, part in enumerate(stream.parts(part_tokens)))
