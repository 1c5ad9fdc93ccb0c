"""Open Inference Protocol v2: the codec of a model version. Independent of HTTP, queues and engines.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. `InferCodec` is created
once per model version and contains everything that is constant between its requests.
"""

import orjson

from maas_ray.bundle.format import BundleInfo
from maas_ray.serve.wire.answer import AnswerWriter
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.serve.wire.request import RequestReader


class InferCodec:
    """Parses the requests of one model version and writes its responses.

    Args:
        model: name of the model.
        version: number of the version.
        info: description of the version.
        max_answer_bytes: maximum bytes of a response's tensors.
    """

    __slots__ = ("has_strings", "read", "read_large", "reader", "write", "write_large", "writer")

    def __init__(self, model: str, version: int, info: BundleInfo, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        writer = self.writer = AnswerWriter(model, version, info, max_answer_bytes)
        reader = self.reader = RequestReader(info.signature)
        # Bound methods, not methods: one call less for each request.
        self.read = reader.read
        self.read_large = reader.read_large
        self.has_strings = any(
            tensor.datatype == "BYTES" or tensor.encoding is not None for tensor in info.signature.inputs
        )
        """Whether an input can be BYTES, whose elements are parsed one at a time in any format."""
        self.write, self.write_large = writer.write, writer.write_large


def write_error(message: str) -> bytes:
    """Returns the JSON document of an error, the protocol's only form."""
    return orjson.dumps({"error": message})
