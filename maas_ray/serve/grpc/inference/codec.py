"""Codec of inference messages: conversion to and from tensors, validated against the signature of a model version."""

from collections.abc import Mapping, Sequence
from typing import Any

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import BundleInfo
from maas_ray.errors import BadRequest
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.inference.message import ModelInfer, Part, join, plain_parameters, raw_output
from maas_ray.serve.grpc.inference.typed_contents import read_typed, write_typed
from maas_ray.serve.wire.answer_size import INLINE_S, MAX_ANSWER_BYTES, AnswerSize, Pause, pieces
from maas_ray.serve.wire.binary import read_binary, read_elements, write_binary, write_strings
from maas_ray.serve.wire.checks import (
    InferRequest,
    WantedOutput,
    check_id,
    complete_inputs,
    known_input,
    num_rows,
    wanted_outputs,
)  # fmt: skip
from maas_ray.serve.wire.classification import classify
from maas_ray.serve.wire.other_forms import OtherForms, pending
from maas_ray.serve.wire.parameters import input_size, request_parameters
from maas_ray.serve.wire.tensors import BINARY_ONLY, check_shape


class MessageCodec:
    """Parses the requests of one model version from messages and writes its responses to messages.

    Args:
        model: name of the model.
        version: number of the version.
        info: description of the version.
        max_answer_bytes: maximum bytes of a response's tensors.
    """

    def __init__(self, model: str, version: int, info: BundleInfo, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._model = model
        self._version = str(version)
        self._labels = info.labels
        self._signature = info.signature
        self._size = AnswerSize(max_answer_bytes, is_batched=info.signature.is_batched)
        self._inputs = {tensor.name: tensor for tensor in info.signature.inputs}
        self._outputs = {tensor.name: tensor for tensor in info.signature.outputs}
        self._forms = OtherForms(info.signature.inputs)
        self._all_raw = wanted_outputs((), self._outputs, is_binary=True)

    def read_message(self, received: ModelInfer) -> InferRequest:
        """Returns the validated request.

        Raises:
            BadRequest: malformed, or it does not match the signature.
        """
        message, raw = received.message, received.raw
        parameters = request_parameters(received.parameters)
        if raw and len(raw) != len(message.inputs):
            raise BadRequest(
                f"the request has {len(message.inputs)} inputs and {len(raw)} raw_input_contents; send one for each "
                "input, in the same order, or none and typed contents"
            )
        found: dict[str, Array] = {}
        for index, entry in enumerate(message.inputs):
            own = spec = known_input(entry.name, self._inputs, found)
            if entry.datatype != spec.datatype:
                spec = self._forms.spec(spec, entry.datatype, list(entry.shape))
            shape = check_shape(spec, list(entry.shape))
            input_size(plain_parameters(entry.parameters), spec.name)
            if not raw:
                found[spec.name] = self._forms.convert(own, read_typed(spec, shape, entry.contents))
            elif entry.HasField("contents") and entry.contents.ListFields():
                raise BadRequest(f"input {spec.name!r} has both contents and raw_input_contents; send one of them")
            else:
                read = read_binary if spec is own or spec.datatype != "BYTES" else read_elements
                found[spec.name] = self._forms.convert(own, read(spec, shape, memoryview(raw[index])))
        inputs = complete_inputs(found, self._inputs)
        return InferRequest(
            id=check_id(received.id or None),
            inputs=inputs,
            outputs=self._wanted(message.outputs, is_raw=not _asks_for_typed(received.parameters)),
            num_rows=num_rows(inputs, self._signature),
            timeout_us=parameters.timeout_us,
            priority=parameters.priority,
            encoded=pending(inputs, self._inputs) if self._forms.has_encodings else (),
        )

    def write_message(self, request: InferRequest, outputs: Mapping[str, Array]) -> list[Part] | None:
        """Returns the `ModelInferResponse` of a request, in consecutive parts.

        Args:
            request: the request.
            outputs: at least the requested ones.

        Returns:
            None if writing it takes so long that `write_large` must, in a thread.

        Raises:
            AnswerTooLarge: it exceeds the limit.
        """
        return None if self._size.expected_s(request, outputs) > INLINE_S else self._write(request, outputs, _never)

    def write_large(self, request: InferRequest, outputs: Mapping[str, Array], pause: Pause) -> list[Part]:
        """As `write_message`, for a thread; `pause` is called between two pieces of work. Returns one part."""
        self._size.expected_s(request, outputs)
        return [join(self._write(request, outputs, pause))]

    def _write(self, request: InferRequest, outputs: Mapping[str, Array], pause: Pause) -> list[Part]:
        message = pb.ModelInferResponse(model_name=self._model, model_version=self._version, id=request.id or "")
        raw: list[Part] = []
        for wanted in request.outputs:
            array, datatype = outputs[wanted.name], self._outputs[wanted.name].datatype
            if wanted.classes:
                array = classify(
                    array, wanted.classes, self._labels, is_batched=self._signature.is_batched, pause=pause
                )
                datatype = "BYTES"
            tensor = message.outputs.add(name=wanted.name, datatype=datatype, shape=array.shape)
            if not wanted.is_binary:
                write_typed(tensor.contents, datatype, array, pause)
                continue
            if array.dtype == object:
                strings = (write_strings(piece) for piece in pieces(array))
                encoded: Part = b"".join(self._size.bounded(strings, pause))
            else:
                encoded = write_binary(array)
            raw += raw_output(encoded)
        return [message.SerializeToString(), *raw]

    def _wanted(self, entries: Sequence[Any], *, is_raw: bool) -> tuple[WantedOutput, ...]:
        """Outputs are raw, as Triton's clients read them, unless typed contents are requested like JSON over HTTP.

        Either all outputs of a response are raw, or none is; datatypes without typed contents are raw.
        """
        if is_raw and not entries:
            return self._all_raw
        pairs = [(entry.name, plain_parameters(entry.parameters)) for entry in entries]
        # First as if nothing were typed: a datatype without typed contents is no reason for a refusal.
        wanted = wanted_outputs(pairs, self._outputs, is_binary=True)
        if not is_raw:
            said = {name: (parameters or {}).get("binary_data") for name, parameters in pairs}
            wanted = tuple(output._replace(is_binary=bool(said.get(output.name))) for output in wanted)
        is_raw = any(
            output.is_binary or (self._outputs[output.name].datatype in BINARY_ONLY and not output.classes)
            for output in wanted
        )
        return tuple(output._replace(is_binary=is_raw) for output in wanted)


def _asks_for_typed(parameters: Mapping[str, Any] | None) -> bool:
    """Whether the response must have typed contents: the parameter that requests JSON over HTTP."""
    given = None if parameters is None else parameters.get("binary_data_output")
    return given is not None and not given


def _never() -> None:
    """Pause of work that is never cancelled."""
