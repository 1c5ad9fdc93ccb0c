"""The Open Inference Protocol v2 over HTTP: what the rest of the server needs of it. Knows no HTTP, queue or engine.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. `InferCodec` is made once
per model version and holds what does not change between its requests; the functions are for those who need one of it.
"""

from collections.abc import Mapping
from functools import lru_cache

import orjson

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import BundleInfo, Signature
from maas_ray.serve.wire.answer import Answer, AnswerWriter
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.serve.wire.checks import InferRequest, WantedOutput
from maas_ray.serve.wire.metadata import PLATFORM, model_config, model_metadata, server_metadata
from maas_ray.serve.wire.request import RequestReader

__all__ = [
    "PLATFORM", "Answer", "InferCodec", "InferRequest", "WantedOutput", "model_config", "model_metadata", "read_infer",
    "server_metadata", "write_error", "write_infer",
]  # fmt: skip


class InferCodec:
    """Reads the requests of one model version and writes its answers.

    Args:
        model: its name.
        version: its number.
        info: its description.
        max_answer_bytes: most bytes of an answer's tensors.
    """

    __slots__ = ("has_strings", "read", "read_large", "write", "write_large", "writer")

    def __init__(self, model: str, version: int, info: BundleInfo, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        writer = self.writer = AnswerWriter(model, version, info, max_answer_bytes)
        # Bound methods, not methods: one call less for each request.
        reader = RequestReader(info.signature)
        self.read = reader.read
        self.read_large = reader.read_large
        self.has_strings = any(tensor.datatype == "BYTES" for tensor in info.signature.inputs)
        """Whether an input is BYTES, whose elements are read one by one in any form."""
        self.write, self.write_large = writer.write, writer.write_large


def read_infer(body: bytes | memoryview, signature: Signature, header_length: int | None = None) -> InferRequest:
    """Reads an inference request.

    Args:
        body: JSON in UTF-8, then the binary tensors.
        signature: what the addressed model version takes and gives.
        header_length: bytes of JSON; None if there is nothing else, 0 for a raw request.

    Raises:
        BadRequest: malformed, or it does not fit the signature.
    """
    return _reader(signature).read(body, header_length)


def write_infer(
    model: str, version: int, request: InferRequest, outputs: Mapping[str, Array], info: BundleInfo
) -> Answer:
    """The answer to a request; see `Answer` for the headers that it needs."""
    return AnswerWriter(model, version, info).write_large(request, outputs, lambda: None)


def write_error(message: str) -> bytes:
    """The protocol's only form of an error."""
    return orjson.dumps({"error": message})


@lru_cache(maxsize=64)
def _reader(signature: Signature) -> RequestReader:
    return RequestReader(signature)
