"""The Open Inference Protocol v2 over HTTP: what the rest of the server needs of it. Knows no HTTP, queue or engine.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. `InferCodec` is made once
per model version and holds what does not change between its requests.
"""

import orjson

from maas_ray.bundle.format import BundleInfo
from maas_ray.serve.wire.answer import AnswerWriter
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.serve.wire.metadata import model_config, model_metadata, server_metadata
from maas_ray.serve.wire.request import RequestReader

__all__ = ["InferCodec", "model_config", "model_metadata", "server_metadata", "write_error"]


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


def write_error(message: str) -> bytes:
    """The protocol's only form of an error."""
    return orjson.dumps({"error": message})
