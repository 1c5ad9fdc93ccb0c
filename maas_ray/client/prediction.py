"""The response to an inference request, with the names of the classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """The response to one request, or to the requests for one file."""

    outputs: "Mapping[str, NDArray[Any]]"
    """Arrays [rows, …] by output name; BYTES as arrays of `str`."""
    model: str
    version: str
    run: str
    """The training run of the version; empty for imported models."""
    request_id: str
    labels: tuple[str, ...] = ()
    """Class names in the order of the scores; empty if the model is not a classifier."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """One mapping per row, with plain values (lists for outputs of several values)."""
        columns = {name: array.reshape(len(array), -1).tolist() for name, array in self.outputs.items()}
        for values in zip(*columns.values(), strict=True):
            yield {name: row[0] if len(row) == 1 else row for name, row in zip(columns, values, strict=True)}

    def named_rows(self) -> Iterator[dict[str, Any]]:
        """As `rows`, with the label instead of the code of a class, and scores of all classes by label."""
        for row in self.rows():
            yield {name: self._named(name, value) for name, value in row.items()}

    def _named(self, name: str, value: Any) -> Any:
        if not self.labels:
            return value
        if isinstance(value, list) and len(value) == len(self.labels):
            return dict(zip(self.labels, value, strict=True))
        is_code = self.outputs[name].dtype.kind in "iu" and not isinstance(value, list)
        return self.labels[value] if is_code and 0 <= value < len(self.labels) else value


def join_predictions(parts: Sequence[Prediction]) -> Prediction:
    """The predictions of consecutive rows as one; version, run and request id are those of the last request."""
    import numpy as np

    outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[-1].outputs}
    return replace(parts[-1], outputs=outputs)
