"""The user's specification of tokenization: tokenizer, row length and stride. Specification only."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.spec import Spec


class TokenizerSpec(Spec):
    """The tokenizer. It is learned from the training split alone and stored with the data."""

    kind: Literal["byte_bpe", "characters", "bytes", "file"] = "byte_bpe"
    """`byte_bpe`: byte-pair encoding as in GPT-2, learned from the data; `characters`: each character of the training
    split; `bytes`: the 256 byte values, applied to UTF-8; `file`: an existing tokenizer.json."""
    vocab_size: int | None = Field(default=None, ge=300, le=1 << 20)
    """For `byte_bpe`: largest number of tokens, special tokens included, 8192 by default; little text gives fewer."""
    uri: str | None = None
    """For `file`: location of the tokenizer.json (as `data.uri`)."""
    end_of_text: str = "<|endoftext|>"
    """The token between documents; a learned vocabulary contains it if there are several documents."""
    mask: str = "<|mask|>"
    """The mask token; a learned vocabulary contains it for masked language modeling."""
    pad: str = "<|pad|>"
    """The padding token of short rows; a learned vocabulary contains it if rows are whole texts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "file") != (self.uri is not None):
            raise ValueError("`kind: file` and `uri: <tokenizer.json>` belong together")
        if self.vocab_size is not None and self.kind != "byte_bpe":
            raise ValueError(
                f"vocab_size is only for byte_bpe: the text or the file decides how many tokens {self.kind} has; "
                "remove it"
            )
        return self


class TextSpec(Spec):
    """Rows of tokens from text."""

    seq_len: PositiveInt
    """Tokens per row."""
    stride: PositiveInt | None = None
    """Token tasks: tokens from the start of one training row to the next. 1: a row starts at every token, as nanoGPT
    trains; by default `seq_len`, so that an epoch contains each token once. Held-out rows never overlap."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """The tokenizer."""
    field: str = "text"
    """The column or JSON field that contains the text, for formats with columns or fields."""
    separator: str | None = Field(default=None, min_length=1, max_length=1000)
    """The string that separates documents within a .txt file; by default a file is one document."""
    split_by: Literal["position", "document"] = "position"
    """Token tasks: `position`: the first part of the text is for training, the next for validation, the last for tests,
    as in nanoGPT; `document`: whole documents, drawn with the split's seed."""
    mask_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Masked language modeling: fraction of tokens to predict. Of these, 80 % are replaced by the mask token, 10 % by
    a random token, and 10 % are left unchanged (Devlin et al. 2019, "BERT")."""

    def changed(self, *names: str) -> list[str]:
        """The given fields that differ from their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
