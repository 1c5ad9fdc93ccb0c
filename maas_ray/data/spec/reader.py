"""How the text of a csv file is read: every option that the file itself does not contain, as one value."""

import codecs
from typing import Self

from pydantic import Field, field_validator, model_validator

from maas_ray.spec import Spec

MISSING_VALUES = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null")
TRUTH = {"true": 1.0, "false": 0.0}
"""Texts of booleans, in any case, and the numbers that they become."""


class ReaderOptions(Spec):
    """Options for reading delimited text. A prepared data set stores them in its features, so that other raw rows can be
    read as the training data was.
    """

    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """The character that separates the values of a csv file; files whose names contain `.tsv` always use a tab."""
    missing_values: tuple[str, ...] = MISSING_VALUES
    """The strings that represent a missing value in a csv file. On the endpoint a missing value is a null."""
    encoding: str = Field(default="utf-8", exclude_if=lambda value: value == "utf-8")
    """The character encoding of a csv file, such as `latin-1`, `cp1252` or `utf-16`."""
    decimal: str = Field(default=".", pattern=r"^[.,]$", exclude_if=lambda value: value == ".")
    """The decimal separator of the numbers in a csv file."""
    thousands: str | None = Field(default=None, min_length=1, max_length=1, exclude_if=lambda value: value is None)
    """The character between groups of three digits, as the comma of `1,634,177`; None: numbers have no groups."""
    affixes: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Texts before or after a number that do not change its value and are removed, as `$` of `$1.98` and `%` of `1.6%`."""
    column_names: tuple[str, ...] | None = Field(default=None, exclude_if=lambda value: value is None)
    """The names of the columns of a csv file without a header; None: the first row is the header."""
    comment: str | None = Field(default=None, min_length=1, max_length=8, exclude_if=lambda value: value is None)
    """Lines of a csv file that begin with this text are skipped; None: there are no such lines."""
    skip_initial_space: bool = Field(default=False, exclude_if=lambda value: not value)
    """Ignore spaces after a delimiter of a csv file."""
    escape: str | None = Field(default=None, min_length=1, max_length=1, exclude_if=lambda value: value is None)
    """The character before a quote or a delimiter that belongs to the text, as the backslash of `\\"`; None: a quote is
    written twice."""

    @field_validator("encoding")
    @classmethod
    def _is_encoding(cls, value: str) -> str:
        try:
            if not codecs.lookup(value)._is_text_encoding:
                raise LookupError
        except LookupError:
            raise ValueError(f"unknown encoding {value!r}; use for example utf-8, latin-1, cp1252 or utf-16") from None
        return value

    @model_validator(mode="after")
    def _is_clear(self) -> Self:
        if self.thousands is not None and (self.thousands.isalnum() or self.thousands in ("-", "+", self.decimal)):
            raise ValueError(
                f"thousands {self.thousands!r} must be a separator other than decimal {self.decimal!r}; "
                "for numbers such as 1.634,5 set decimal: ',' and thousands: '.'"
            )
        names = self.column_names or ()
        if self.column_names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError("column_names must be distinct names, one for each column")
        if any(not affix.strip() or any(one.isdigit() for one in affix) for affix in self.affixes):
            raise ValueError("affixes must not be empty or contain digits, which would change numbers")
        return self
