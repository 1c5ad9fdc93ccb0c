"""The user's specification of a data set: source, target, task, split and cleaning. Specification only."""

from typing import Literal, Self

from pydantic import Field, model_validator

from maas_ray.data.spec.cleaning import CleaningSpec
from maas_ray.data.spec.features import TOKEN_TASKS, Task
from maas_ray.data.spec.reader import ReaderOptions
from maas_ray.data.spec.split import SPLITS, RareClassesSpec, SplitSpec
from maas_ray.data.spec.text import TextSpec
from maas_ray.spec import Spec

__all__ = ["SPLITS", "DataSpec", "Format", "ImageSpec", "SplitSpec"]

Format = Literal["csv", "parquet", "arrow", "numpy", "idx", "sklearn", "text", "jsonl", "images"]
TEXT_FORMATS = ("text", "jsonl", "parquet")
"""File formats that the token tasks read text from."""
DEFAULT_EXPANSION = 100.0


class ImageSpec(Spec):
    """The size of every image row; by default that of the first file. Images of other sizes are scaled.

    EXIF orientation is applied, the high byte of 16-bit values is used, and of several frames the first one.
    """

    height: int | None = Field(default=None, ge=1, le=8192)
    """Pixels."""
    width: int | None = Field(default=None, ge=1, le=8192)
    """Pixels."""
    channels: Literal[1, 3] | None = None
    """1: gray; 3: red, green, blue. By default 3 if any of the images has colors."""
    background: int = Field(default=255, ge=0, le=255, exclude_if=lambda value: value == 255)
    """Gray level that is visible behind transparent pixels; 255: white."""


class DataSpec(ReaderOptions):
    """A data set: its location, features, target and task, and how it is split and cleaned.

    Credentials for `s3://` are never part of the spec: they come from the environment (`AWS_ACCESS_KEY_ID`, …).
    """

    uri: str
    """A file, a directory of files, a directory with a folder of images per class, or a glob (`data/*.parquet`), each
    as a local path, `file:///path` or `s3://bucket/key`; or `sklearn:` followed by digits, breast_cancer, diabetes,
    wine or iris."""
    format: Literal["auto"] | Format = "auto"
    """`auto`: inferred from the file's extension."""
    labels_uri: str | None = None
    """The file that contains the target for NumPy (`.npy`) and IDX; for IDX by default the name of the images' file
    with `labels-idx1`."""
    features: tuple[str, ...] | None = None
    """Columns to predict from, in the order in which the endpoint takes them; by default all columns except the
    target."""
    target: str = "target"
    """The column to predict; if the target is in a separate file (`labels_uri`, IDX), the name to give it. Rows without
    a target are dropped and counted."""
    task: Task
    """`classification`: one of two or more classes; `binary`: one of two classes, from one logit; `regression`: a
    number; `language_modeling`: the next token at every position of a text; `masked_language_modeling`: the masked
    tokens of a text."""
    text: TextSpec | None = None
    """How text becomes tokens: for the token tasks, and for rows whose only feature is a text."""
    image: ImageSpec = ImageSpec()
    """The size of images in folders. Their only feature is `image`; their target is the folder's name."""
    split: SplitSpec = SplitSpec()
    """The rows that are held out."""
    target_scaling: Literal["standard", "none"] = Field(
        default="standard", exclude_if=lambda value: value == "standard"
    )
    """Regression: `standard` trains on (target - mean) / standard deviation of the training split, so that a target of
    any unit can be learned. Losses are in these units; metrics, predictions and the endpoint are in those of the data.
    `none` trains on the target itself."""
    positive_class: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Binary: the class that the model's probability and the metrics f1, precision and recall are of; by default the
    last class, in the order of numbers or else of the alphabet."""
    rare_classes: RareClassesSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    """How classes with few rows are merged; None: all classes are kept, and a class that a held-out split contains but
    the training split does not is refused."""
    weight: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column with the weight of each row in the training loss, at least 0; not a feature. The loss of a step is the
    weighted mean over the rows of its global batch. Metrics do not use it."""
    cleaning: CleaningSpec = CleaningSpec()
    """How the feature columns are cleaned."""
    max_expansion: float = Field(
        default=DEFAULT_EXPANSION, ge=1, le=1e9, exclude_if=lambda value: value == DEFAULT_EXPANSION
    )
    """The largest ratio of a file's size after decompression or decoding to its size on disk, for results of more than
    64 MiB. A larger ratio is rejected, because archives that are crafted to exhaust memory have one."""
    max_dropped: float = Field(default=0.5, ge=0, le=1, exclude_if=lambda value: value == 0.5)
    """The largest share of rows that may be dropped, because of a missing target or by `missing: drop_row`."""
    max_unconvertible: float = Field(default=0.05, ge=0, le=1, exclude_if=lambda value: value == 0.05)
    """The largest share of the values of a column or the target that may be present but not convertible to a number or a
    date. They are treated as missing."""
    max_numbers_in_text: float = Field(default=0.5, ge=0, le=1, exclude_if=lambda value: value == 0.5)
    """The largest share of numbers in a text column of a csv file without a `cast`: a few values that are not numbers
    would otherwise make a category of every number."""
    endpoint: str | None = None
    """URL of an S3-compatible service other than AWS."""
    region: str | None = None
    """S3 region; by default that of the environment."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = self.features or ()
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"features names {', '.join(repeated)} more than once")
        if self.features is not None and not names:
            raise ValueError("features is empty; name at least one column, or omit features to use all columns")
        for name in (self.target, self.split.column, self.weight):
            if name in names:
                raise ValueError(f"{name!r} cannot be a feature: it is the target, the split column or the weight")
        if self.target == self.split.column:
            raise ValueError(f"{self.target!r} cannot be both the target and the split column")
        self._check_classes()
        if self.task in TOKEN_TASKS:
            self._check_tokens()
        elif self.text is not None:
            self._check_texts(self.text)
        elif self.format == "text":
            raise ValueError(f"format text has no target; use it with the tasks {' and '.join(TOKEN_TASKS)}")
        return self

    @property
    def reader(self) -> ReaderOptions:
        """The options for reading text."""
        return ReaderOptions.model_validate({name: getattr(self, name) for name in ReaderOptions.model_fields})

    def _check_classes(self) -> None:
        """Rejects fields that would have no effect on the task, and columns with two uses."""
        if self.target in (self.weight, *self.split.other_columns):
            raise ValueError(
                f"{self.target!r} is the target; it cannot be the weight, split.group or split.order_by too"
            )
        if self.weight is not None and self.weight in (
            self.split.column,
            self.split.stratify,
            *self.split.other_columns,
        ):
            raise ValueError(f"{self.weight!r} cannot be both the weight and a column of the split")
        if self.split.stratify in (True, self.target) and self.task == "regression":
            raise ValueError("split.stratify needs classes, but the task is regression; name a column with few values")
        if self.target_scaling != "standard" and self.task != "regression":
            raise ValueError(f"target_scaling is for the task regression, but the task is {self.task}; remove it")
        if self.positive_class is not None and self.task != "binary":
            raise ValueError(f"positive_class is for the task binary, but the task is {self.task}; remove it")
        if self.rare_classes is not None and self.task != "classification":
            raise ValueError(f"rare_classes is for the task classification, but the task is {self.task}; remove it")

    def _check_texts(self, text: TextSpec) -> None:
        """Rejects fields that would silently have no effect on rows that are whole texts."""
        if self.features not in (None, (text.field,)):
            raise ValueError(
                f"a text must be the only feature; omit features: text.field {text.field!r} names the column"
            )
        if self.cleaning != CleaningSpec():
            raise ValueError("cleaning has no effect on a text (rows without a text are dropped); remove cleaning")
        if unused := text.changed("stride", "separator", "split_by", "mask_fraction"):
            raise ValueError(f"rows are whole texts in the task {self.task}: text.{unused[0]} cannot be used with it")
        if self.format == "text":
            raise ValueError(f"format text has no target; use it with the tasks {' and '.join(TOKEN_TASKS)}")

    def _check_tokens(self) -> None:
        """Rejects fields that would silently have no effect on the token tasks."""
        if self.text is None:
            raise ValueError(f"the task {self.task} needs `text` with at least seq_len, as in text: {{seq_len: 256}}")
        if self.format not in ("auto", *TEXT_FORMATS):
            raise ValueError(f"the task {self.task} reads {', '.join(TEXT_FORMATS)}, not {self.format}")
        unused = [
            name
            for name in ("features", "target", "cleaning", "labels_uri", "weight")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        split = self.split
        unused += [
            f"split.{name}" for name in ("column", "stratify", "group", "order_by", "fold") if getattr(split, name)
        ]
        if unused:
            raise ValueError(f"the task {self.task} has no columns: {unused[0]} cannot be used with it")
        if self.task == "language_modeling" and self.text.changed("mask_fraction"):
            raise ValueError("text.mask_fraction is only for masked_language_modeling; remove it")
