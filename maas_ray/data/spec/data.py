"""What data a run is trained on, as the user says it. Reads nothing."""

from typing import Literal, Self

from pydantic import Field, model_validator

from maas_ray.data.spec.cleaning import CleaningSpec
from maas_ray.data.spec.features import TOKEN_TASKS, Task
from maas_ray.data.spec.text import TextSpec
from maas_ray.spec import Spec

Format = Literal["csv", "parquet", "arrow", "numpy", "idx", "sklearn", "text", "jsonl", "images"]
TEXT_FORMATS = ("text", "jsonl", "parquet")
"""What the text of token tasks is read from."""
SPLITS = ("train", "validation", "test")
DEFAULT_EXPANSION = 100.0


class SplitSpec(Spec):
    """Which rows are held out. A row's split depends on its number, the number of rows and the seed, on nothing else."""

    validation: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the rows that watches training; 0: none."""
    test: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of the rows that the evaluation uses; 0: none."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Another seed gives another split."""
    column: str | None = None
    """A column that says `train`, `validation` or `test` for each row; the fractions and the seed are then not used."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation} + test {self.test} leave nothing for training; their sum must be below 1"
            )
        return self


class ImageSpec(Spec):
    """What every row of images in folders becomes; by default what the first file is. Others are scaled."""

    height: int | None = Field(default=None, ge=1, le=8192)
    """Pixels."""
    width: int | None = Field(default=None, ge=1, le=8192)
    """Pixels."""
    channels: Literal[1, 3] | None = None
    """1: grey; 3: red, green, blue."""


class DataSpec(Spec):
    """A data set: where it lies, what is predicted from what, how it is split and cleaned.

    Credentials for `s3://` never stand here: they come from the environment (`AWS_ACCESS_KEY_ID`, …).
    """

    uri: str
    """A file, a directory of files, a directory with a folder of images per class, or a glob (`data/*.parquet`); a local path, `file:///path` or `s3://bucket/key`; or
    `sklearn:` with digits, breast_cancer, diabetes, wine or iris."""
    format: Literal["auto"] | Format = "auto"
    """`auto`: by the file's extension."""
    labels_uri: str | None = None
    """The file with the target for NumPy (`.npy`) and IDX; for IDX by default the images' name with `labels-idx1`."""
    features: tuple[str, ...] | None = None
    """Columns to predict from, in the order in which the endpoint takes them; by default all others than the target."""
    target: str = "target"
    """The column to predict; with a file of its own (`labels_uri`, IDX) the name that it gets. Rows without a
    target are left out and counted."""
    task: Task
    """`classification`: one of two or more classes; `binary`: one of two, by one logit; `regression`: a number;
    `language_modeling`: the next token at every place of a text; `masked_language_modeling`: hidden tokens of a text."""
    text: TextSpec | None = None
    """How text becomes tokens: for the tasks on tokens, and for rows whose one feature is a text."""
    image: ImageSpec = ImageSpec()
    """The size of images in folders, whose one feature is `image`; the target is the folder's name."""
    split: SplitSpec = SplitSpec()
    """Which rows are held out."""
    cleaning: CleaningSpec = CleaningSpec()
    """How the feature columns are cleaned."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Separates the values of a csv file."""
    missing_values: tuple[str, ...] = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null")
    """What stands for a missing value in a csv file. On the endpoint a missing value is a null."""
    max_expansion: float = Field(
        default=DEFAULT_EXPANSION, ge=1, le=1e9, exclude_if=lambda value: value == DEFAULT_EXPANSION
    )
    """How many times its size a file may become when it is decompressed or decoded, where that is more than 64 MiB. More
    is refused: that is what archives are like which are made to fill a memory."""
    endpoint: str | None = None
    """URL of an S3-compatible service other than AWS."""
    region: str | None = None
    """S3 region; by default what the environment says."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = self.features or ()
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"features names {', '.join(repeated)} more than once")
        if self.features is not None and not names:
            raise ValueError("features is empty; name at least one column, or leave it out to use all")
        for name in (self.target, self.split.column):
            if name in names:
                raise ValueError(f"{name!r} cannot be a feature: it is the target or names the split")
        if self.target == self.split.column:
            raise ValueError(f"{self.target!r} cannot be both the target and the column that names the split")
        if self.task in TOKEN_TASKS:
            self._check_tokens()
        elif self.text is not None:
            self._check_texts(self.text)
        elif self.format == "text":
            raise ValueError(f"format text has no target; use it with the tasks {' and '.join(TOKEN_TASKS)}")
        return self

    def _check_texts(self, text: TextSpec) -> None:
        """Refuses what would silently have no effect on rows that are whole texts."""
        if self.features not in (None, (text.field,)):
            raise ValueError(f"a text stands alone; leave features out: text.field {text.field!r} names the column")
        if self.cleaning != CleaningSpec():
            raise ValueError("a text is not cleaned: rows without one are left out; take cleaning back")
        if unused := text.changed("stride", "separator", "split_by", "mask_fraction"):
            raise ValueError(f"rows are whole texts in the task {self.task}: text.{unused[0]} cannot be used with it")
        if self.format == "text":
            raise ValueError(f"format text has no target; use it with the tasks {' and '.join(TOKEN_TASKS)}")

    def _check_tokens(self) -> None:
        """Refuses what would silently have no effect on the tasks on tokens."""
        if self.text is None:
            raise ValueError(f"the task {self.task} needs `text`, at least its seq_len: text: {{seq_len: 256}}")
        if self.format not in ("auto", *TEXT_FORMATS):
            raise ValueError(f"the task {self.task} reads {', '.join(TEXT_FORMATS)}, not {self.format}")
        unused = [
            name
            for name in ("features", "target", "cleaning", "labels_uri")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if unused or self.split.column:
            raise ValueError(
                f"the task {self.task} has no columns: {(*unused, 'split.column')[0]} cannot be used with it"
            )
        if self.task == "language_modeling" and self.text.changed("mask_fraction"):
            raise ValueError("text.mask_fraction is for masked_language_modeling")
