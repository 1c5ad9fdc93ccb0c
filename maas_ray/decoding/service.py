"""The child's side of a decoder: decodes the elements of one request at a time, until its parent closes the socket."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from maas_ray.arrays import Array
from maas_ray.confined.frames import receive_frame, send_frame
from maas_ray.decoding.pixels import Undecodable, decode_image
from maas_ray.decoding.tokenizer import Tokenizer, encode_rows
from maas_ray.errors import DataError


def serve(sock: socket.socket, descriptors: Sequence[int]) -> None:
    """Receives the encoding and the tokenizer, then the requests.

    An answer has the decoded rows, or the index of the first element that cannot be decoded and the reason.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads would outlive a limit of one request
    encoding, content = receive_frame(sock)
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = Tokenizer(bytes(content[0])) if content else None
    except DataError as error:
        send_frame(sock, {"reason": str(error)})
        return
    send_frame(sock, {})
    while True:
        try:
            _, elements = receive_frame(sock)
        except EOFError:
            return
        try:
            rows = _texts(tokenizer, encoding, elements) if tokenizer is not None else _images(encoding, elements)
        except _Refused as refused:
            send_frame(sock, {"row": refused.row, "reason": refused.reason})
        else:
            send_frame(sock, {}, [np.ascontiguousarray(rows).data])


class _Refused(Exception):
    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)
        self.row = row
        self.reason = reason


def _images(encoding: dict[str, Any], elements: Sequence[Any]) -> Array:
    rows = np.empty((len(elements), *encoding["shape"]), dtype=np.uint8)
    for number, element in enumerate(elements):
        try:
            rows[number] = decode_image(element, encoding["shape"], encoding["background"])
        except Undecodable as error:
            raise _Refused(number, str(error)) from error
    return rows


def _texts(tokenizer: Tokenizer, encoding: dict[str, Any], elements: Sequence[Any]) -> Array:
    texts = []
    for number, element in enumerate(elements):
        if not len(element):
            raise _Refused(number, "it is empty; training left out such rows")
        try:
            texts.append(bytes(element).decode())
        except UnicodeDecodeError as error:
            raise _Refused(number, f"it is not text in UTF-8 (byte {error.start})") from error
    try:
        rows, _ = encode_rows(tokenizer, texts, encoding["length"], encoding["pad"])
    except DataError as error:
        raise _Refused(0, str(error)) from error
    return rows.astype(np.int64)
