"""Decodes the encoded values of a model's input in child processes with limits of time and memory. Imports no decoder.

Image files and tokenizers are untrusted, and are processed by native code: a request that crashes it, hangs or exhausts
the memory loses its own child process only.
"""

import base64
import binascii
import re
import time
from collections.abc import Sequence
from math import prod
from queue import Empty, LifoQueue

import numpy as np

from maas_ray import confined
from maas_ray.arrays import Array
from maas_ray.confined.frames import MAX_BLOBS, BadFrame, receive_frame, send_frame
from maas_ray.decoding.spec import ImageEncoding, TextEncoding
from maas_ray.errors import BadRequest, BundleError, ConfinedError, DeadlineExceeded, EngineFailed, MaasError

MAX_DECODE_S = 10.0
"""Longest time to decode the elements of one request, less than any reasonable timeout of a request."""
MAX_MEMORY_BYTES = 1 << 30
_FILE_FACTOR = 20
"""A tokenizer in memory was measured to take up to 12 times the size of its file."""
_START_S = 120.0
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+={0,2}\s*")
"""The files of all image formats contain other bytes, so that a text in Base64 cannot be one."""


class InputDecoder:
    """Decodes the elements of one input; safe to use from several threads, each of which gets its own child.

    Args:
        name: name of the input.
        encoding: how its elements are encoded.
        shape: sizes of a decoded row.
        tokenizer: content of the tokenizer's file, for texts.
        max_bytes: maximum bytes of the decoded rows of one request.
        timeout_s: longest time to decode one request.
    """

    def __init__(
        self,
        name: str,
        encoding: ImageEncoding | TextEncoding,
        shape: Sequence[int],
        tokenizer: bytes | None = None,
        *,
        max_bytes: int,
        timeout_s: float = MAX_DECODE_S,
    ) -> None:
        self.name = name
        self._encoding = encoding
        self._shape = tuple(shape)
        self._dtype = np.dtype(np.uint8 if encoding.kind == "image" else np.int64)
        self._tokenizer = tokenizer if encoding.kind == "text" else None
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._idle: LifoQueue[confined.Child] = LifoQueue()
        self._is_closed = False

    @property
    def num_idle(self) -> int:
        """Number of children that wait for a request."""
        return self._idle.qsize()

    def start(self) -> None:
        """Starts a child, so that the first request need not wait for it.

        Raises:
            BundleError: the tokenizer cannot be used.
        """
        try:
            self._idle.put(self._start())
        except ConfinedError as error:
            raise BundleError(f"the decoder of input {self.name!r} cannot be started: {error}") from error

    def check(self, num_rows: int) -> int:
        """Returns the bytes of decoded rows.

        Raises:
            BadRequest: they exceed the limit.
        """
        row_bytes = prod(self._shape) * self._dtype.itemsize
        if num_rows > MAX_BLOBS or num_rows * row_bytes > self._max_bytes:
            limit = min(MAX_BLOBS, self._max_bytes // max(1, row_bytes))
            raise BadRequest(
                f"input {self.name!r} has {num_rows} encoded rows, which take {num_rows * row_bytes} bytes when they are "
                f"decoded; the limit is {limit} rows per request; send fewer rows"
            )
        return num_rows * row_bytes

    def decode(self, elements: Array, timeout_s: float) -> Array:
        """Decodes one request.

        Args:
            elements: objects of `bytes`, or of `str` from JSON (images in Base64), [N] or [N, 1].
            timeout_s: seconds until the request's deadline.

        Returns:
            uint8 [N, channels, height, width], or int64 [N, length].

        Raises:
            BadRequest: an element cannot be decoded, or decoding crashes, takes too long or too much memory.
            DeadlineExceeded: the request's deadline passed.
            EngineFailed: no child process can be started.
        """
        blobs = [self._content(number, element) for number, element in enumerate(elements.ravel().tolist())]
        limit_s = min(timeout_s, self._timeout_s)
        if limit_s <= 0:
            raise DeadlineExceeded(f"the deadline passed before input {self.name!r} was decoded; allow more time")
        try:
            child = self._take()
        except (ConfinedError, BundleError) as error:
            raise EngineFailed(f"the decoder of input {self.name!r} cannot be started; retry later") from error
        is_usable = False
        try:
            answer, found = self._exchange(child, blobs, limit_s)
            is_usable = True
        except TimeoutError as error:
            if limit_s < self._timeout_s:
                raise DeadlineExceeded(
                    f"input {self.name!r} was not decoded within the request's deadline; allow more time"
                ) from error
            raise BadRequest(
                f"input {self.name!r} was not decoded within the limit of {self._timeout_s:g} s; send other values, or "
                "fewer of them"
            ) from error
        except (EOFError, OSError) as error:
            why = child.why_it_died()
            raise BadRequest(f"input {self.name!r} cannot be decoded: {why}") from error
        except BadFrame as error:
            raise BadRequest(f"input {self.name!r} cannot be decoded") from error
        finally:
            self._give_back(child, is_usable=is_usable)
        if "reason" in answer:
            raise BadRequest(f"input {self.name!r}, row {answer['row']}: cannot be decoded: {answer['reason']}")
        return np.frombuffer(found[0], self._dtype).reshape(len(blobs), *self._shape)

    def close(self) -> None:
        """Ends the idle children; a child at work ends with its request."""
        self._is_closed = True
        while True:
            try:
                self._idle.get_nowait().close()
            except Empty:
                return

    def _content(self, number: int, element: bytes | str) -> bytes:
        if isinstance(element, str):
            element = element.encode(errors="surrogateescape")  # as the wire decoded it
        if self._encoding.kind == "image" and _BASE64.fullmatch(element):
            try:
                return base64.b64decode(element)
            except binascii.Error as error:
                raise BadRequest(
                    f"input {self.name!r}, row {number}: is neither an image file nor one in Base64"
                ) from error
        return element

    def _exchange(
        self, child: confined.Child, blobs: Sequence[bytes], limit_s: float
    ) -> tuple[dict[str, object], list[bytearray]]:
        until_s = time.monotonic() + limit_s
        child.socket.settimeout(limit_s)
        send_frame(child.socket, {}, blobs)
        return receive_frame(child.socket, self._max_bytes + (1 << 16), until_s)

    def _take(self) -> confined.Child:
        while True:
            try:
                child = self._idle.get_nowait()
            except Empty:
                return self._start()
            if not child.has_ended():
                return child
            child.close()

    def _give_back(self, child: confined.Child, *, is_usable: bool) -> None:
        if not is_usable or self._is_closed:
            child.close()
        else:
            self._idle.put(child)

    def _start(self) -> confined.Child:
        content = [] if self._tokenizer is None else [self._tokenizer]
        limits = confined.Limits(wall_s=_START_S, memory_bytes=MAX_MEMORY_BYTES + _FILE_FACTOR * sum(map(len, content)))
        child = confined.start("maas_ray.decoding.service:serve", limits, what=f"input {self.name!r}", is_service=True)
        try:
            child.send({**self._encoding.model_dump(mode="json"), "shape": list(self._shape)}, content)
            answer, _ = receive_frame(child.socket, 1 << 16, time.monotonic() + _START_S)
            if "reason" in answer:
                raise BundleError(f"the tokenizer of input {self.name!r} cannot be used: {answer['reason']}")
        except TimeoutError:
            child.close()
            raise BundleError(f"the decoder of input {self.name!r} did not start within {_START_S:g} s") from None
        except (EOFError, OSError) as error:
            why: MaasError = child.why_it_died()
            child.close()
            raise BundleError(f"the decoder of input {self.name!r} cannot be used: {why}") from error
        except BaseException:
            child.close()
            raise
        return child
