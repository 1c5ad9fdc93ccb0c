"""Size of a response and time to write it, estimated before any of it is written."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from maas_ray.bundle.datatypes import Array
from maas_ray.errors import AnswerTooLarge
from maas_ray.serve.wire.checks import InferRequest, WantedOutput

MAX_ANSWER_BYTES = 32 << 20
"""Default of `limits.max_answer_bytes`."""
MAX_CLASSES = 1 << 18
"""Maximum rows times classes of one classified output: about a microsecond and 20 bytes each."""
INLINE_S = 1e-3
"""Responses that are expected to take longer to write are written in a thread."""
PIECE = 1 << 14
"""Elements that are written at once: about 0.5 ms, in which no other thread has the interpreter."""

_MANY_STRINGS = 4096
_LEAST = {"f": 4, "b": 5, "u": 2, "i": 2}
"""Bytes of the shortest JSON element of a kind, with its comma: `0.0`, `true`, `0`."""
_SECONDS = {"f": 50e-9, "b": 10e-9, "u": 15e-9, "i": 15e-9}

Pause = Callable[[], None]
"""Called between two pieces of work in a thread; raises if the work was cancelled."""


class AnswerSize:
    """Compares responses with their limit.

    Args:
        max_bytes: maximum bytes of a response's tensors.
        is_batched: whether the first dimension of an output counts rows.
    """

    __slots__ = ("_is_batched", "_max_bytes")

    def __init__(self, max_bytes: int, *, is_batched: bool) -> None:
        self._max_bytes = max_bytes
        self._is_batched = is_batched

    def expected_s(self, request: InferRequest, outputs: Mapping[str, Array]) -> float:
        """Returns the expected seconds of writing a response.

        Raises:
            AnswerTooLarge: it exceeds the limit in any case.
        """
        least, seconds = 0, 0.0
        for wanted in request.outputs:
            array = outputs[wanted.name]
            size, kind = array.size, array.dtype.kind
            if wanted.classes:
                num_rows, num_classes = self.classes(wanted, array)
                least += 14 * num_rows * num_classes
                seconds += 30e-6 * num_rows + 2e-6 * num_rows * num_classes + 10e-9 * size
            elif kind == "O":
                if size > _MANY_STRINGS:  # counting them also takes time
                    seconds += 1.0
                    continue
                least += sum(map(len, array.ravel().tolist())) + 3 * size
                seconds += 300e-9 * size + 2e-9 * least
            elif wanted.is_binary:
                least += array.nbytes
                seconds += 0.5e-9 * array.nbytes
            else:
                least += _LEAST[kind] * size
                seconds += _SECONDS[kind] * size
        if least > self._max_bytes:
            raise self.too_large(least)
        return seconds

    def classes(self, wanted: WantedOutput, array: Array) -> tuple[int, int]:
        """Returns the rows of a classified output, and the classes of each.

        Raises:
            AnswerTooLarge: their product is too large.
        """
        num_rows = array.shape[0] if self._is_batched else 1
        num_classes = min(wanted.classes, array.size // max(1, num_rows))
        if num_rows * num_classes > MAX_CLASSES:
            raise AnswerTooLarge(
                f"output {wanted.name!r}: {num_classes} classes of {num_rows} rows are {num_rows * num_classes} "
                f"strings, the limit is {MAX_CLASSES}; request fewer classes or fewer rows, or the tensor itself"
            )
        return num_rows, num_classes

    def too_large(self, least: int) -> AnswerTooLarge:
        """Returns the error for a response that has at least this many bytes."""
        return AnswerTooLarge(
            f"the response has at least {least} bytes, the limit is {self._max_bytes} (limits.max_answer_bytes); send "
            "fewer rows, or request fewer outputs or binary data"
        )

    def bounded(self, parts: Iterator[bytes], pause: Pause) -> Iterator[bytes]:
        """Yields the same parts while their total is within the limit.

        Raises:
            AnswerTooLarge: the total exceeds the limit.
        """
        total = 0
        for part in parts:
            total += len(part)
            if total > self._max_bytes:
                raise self.too_large(total)
            yield part
            pause()


def pieces(array: Array) -> Iterator[Array]:
    """Yields an array's elements in row-major order, in pieces."""
    flat = np.ascontiguousarray(array).ravel() if array.dtype != object else array.ravel()
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]
