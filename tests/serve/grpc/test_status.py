"""gRPC statuses of errors."""

import grpc
import pytest

from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, Overloaded, RequestError
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.status import MAX_MESSAGE_BYTES, status_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (DeadlineExceeded("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Overloaded("x"), grpc.StatusCode.UNAVAILABLE),
        (MaasError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_have_the_status_that_grpc_has_for_them(error: MaasError, code: grpc.StatusCode) -> None:
    assert status_of(error).code == code


def test_every_error_has_a_status() -> None:
    kinds: list[type[MaasError]] = [MaasError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert len(kinds) > 20
    unknown = {
        kind.__name__
        for kind in kinds
        if kind.http_status < 500 and status_of(kind("x")).code == grpc.StatusCode.INTERNAL
    }
    assert unknown == {"FilesRefused"}
    assert all(status_of(kind("x")).code == grpc.StatusCode.UNAVAILABLE for kind in kinds if kind.http_status == 503)
    assert issubclass(RequestError, MaasError)


def test_a_refusal_for_load_contains_the_retry_time_in_both_forms() -> None:
    metadata = dict(status_of(Overloaded("full", 2.5)).metadata)
    assert metadata["grpc-retry-pushback-ms"] == "2500"
    details = pb.Status.FromString(metadata["grpc-status-details-bin"])
    assert (details.code, details.message) == (14, "full")
    assert details.details[0].type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert pb.RetryInfo.FromString(details.details[0].value).retry_delay.ToMilliseconds() == 2500


def test_a_long_message_is_cut_between_characters() -> None:
    message = status_of(BadRequest("é" * 5000)).message
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    assert message == "é" * (len(message) - 3) + "..."
