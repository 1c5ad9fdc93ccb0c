"""Bodies of the v2 protocol, read and written by the codec of a model version."""

from collections.abc import Mapping

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import BundleInfo, Signature
from maas_ray.serve.wire.answer import InferResponse
from maas_ray.serve.wire.checks import InferRequest
from maas_ray.serve.wire.request import RequestReader
from maas_ray.serve.wire.v2 import InferCodec


def read_infer(body: bytes | memoryview, signature: Signature, header_length: int | None = None) -> InferRequest:
    """What a body says; see `RequestReader.read`."""
    return RequestReader(signature).read(body, header_length)


def write_infer(
    model: str, version: int, request: InferRequest, outputs: Mapping[str, Array], info: BundleInfo
) -> InferResponse:
    """The answer to a request, as `InferCodec` writes it."""
    return InferCodec(model, version, info).write_large(request, outputs, lambda: None)
