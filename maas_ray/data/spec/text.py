"""How text becomes rows of tokens, as the user says it. Reads nothing."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from maas_ray.spec import Spec


class TokenizerSpec(Spec):
    """How text is cut into tokens. The tokenizer is learned from the training split alone and stored with the data."""

    kind: Literal["byte_bpe", "characters", "bytes", "file"] = "byte_bpe"
    """`byte_bpe`: byte pairs merged as in GPT-2, learned here; `characters`: each character of the training split;
    `bytes`: the 256 bytes of UTF-8; `file`: a tokenizer.json that exists."""
    vocab_size: int | None = Field(default=None, ge=300, le=1 << 20)
    """For `byte_bpe`: tokens at most, special ones included, 8192 by default; less text gives fewer."""
    uri: str | None = None
    """For `file`: where the tokenizer.json lies (as `data.uri`)."""
    end_of_text: str = "<|endoftext|>"
    """The token between documents; a vocabulary that is built here has it if there are several documents."""
    mask: str = "<|mask|>"
    """The token that hides others; a vocabulary that is built here has it for masked language modeling."""
    pad: str = "<|pad|>"
    """The token that fills up short rows; a vocabulary that is built here has it where rows are whole texts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "file") != (self.uri is not None):
            raise ValueError("`kind: file` and `uri: <tokenizer.json>` belong together")
        if self.vocab_size is not None and self.kind != "byte_bpe":
            raise ValueError(f"vocab_size is for byte_bpe; the text decides how many tokens {self.kind} has")
        return self


class TextSpec(Spec):
    """Rows of tokens from text."""

    seq_len: PositiveInt
    """Tokens per row."""
    stride: PositiveInt | None = None
    """Token tasks: tokens from the start of one training row to the next. 1: rows at every place, the training of
    nanoGPT; by default `length`, so that an epoch has each token once. Held-out rows never overlap."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """How text is cut into tokens."""
    field: str = "text"
    """The column or JSON field that holds the text, where files have fields."""
    separator: str | None = Field(default=None, min_length=1, max_length=1000)
    """What separates documents within a .txt file; by default a file is one document."""
    split_by: Literal["position", "document"] = "position"
    """Token tasks: `place`: the first part of the text trains, then comes validation, the last part is for tests, as in
    nanoGPT; `document`: whole documents, drawn with the split's seed."""
    mask_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Masked language modeling: share of tokens to predict. Of these 80 % are hidden by the mask token, 10 % replaced
    by a random one and 10 % left as they are (Devlin et al. 2019, "BERT")."""

    def changed(self, *names: str) -> list[str]:
        """Those of the fields that do not have their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
