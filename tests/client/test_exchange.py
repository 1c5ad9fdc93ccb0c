"""What follows each outcome of an attempt, without a connection."""

from collections.abc import Sequence

import pytest

from maas_ray.client.exchange import Deadline, Exchange, ModelRequests, Response
from maas_ray.client.retries import Retries
from maas_ray.errors import BadRequest, ClusterError, DeadlineExceeded, MaasError, Overloaded, RequestError

URL = "http://pool/v2/models/m"
OVERLOADED = Response(503, {"Retry-After": "0.25"}, b'{"error": "the queue is full"}')


def exchange(timeout_s: float = 30.0, max_attempts: int = 3) -> Exchange:
    return Exchange("GET", URL, Deadline(timeout_s), Retries(max_attempts))


def test_a_refused_request_is_sent_again_after_the_servers_pause() -> None:
    one = exchange()
    for _ in range(2):
        assert 29 < one.begin_attempt() <= 30
        assert one.received(OVERLOADED) == 0.25
    one.begin_attempt()
    assert one.received(Response(200, {}, b"")) is None


@pytest.mark.parametrize(
    ("responses", "expected", "message"),
    [
        ([OVERLOADED] * 3, Overloaded, "http://pool/v2/models/m answered 503: the queue is full"),
        ([Response(400, {}, b'{"error": "no x"}')], BadRequest, "answered 400: no x"),
        ([Response(502, {}, b"<html>")], RequestError, "answered 502: <html>"),
        ([Response(503, {"Retry-After": "60"}, b"")], Overloaded, "answered 503: no message"),
    ],
    ids=["too many attempts", "an error that remains", "another server", "a pause beyond the deadline"],
)
def test_the_last_response_raises_its_error(
    responses: Sequence[Response], expected: type[MaasError], message: str
) -> None:
    one = exchange()
    for response in responses[:-1]:
        one.begin_attempt()
        assert one.received(response) is not None
    one.begin_attempt()
    with pytest.raises(expected, match=message):
        one.received(responses[-1])


def test_a_broken_connection_is_tried_again_and_then_named() -> None:
    one = exchange(max_attempts=2)
    one.begin_attempt()
    assert 0 <= one.broken(OSError("reset")) < 1
    one.begin_attempt()
    with pytest.raises(ClusterError, match=f"nothing answers at {URL}: reset") as caught:
        one.broken(OSError("reset"))
    assert isinstance(caught.value.__cause__, OSError)


def test_no_attempt_begins_after_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match="within 0 s"):
        exchange(timeout_s=0).begin_attempt()


def test_each_attempt_sends_the_remaining_time() -> None:
    one = exchange(timeout_s=2)
    one.begin_attempt()
    assert 1900 < int(one.headers["x-request-timeout-ms"]) <= 2000


@pytest.mark.parametrize(
    ("model", "version", "url"),
    [
        ("m", None, "http://pool/v2/models/m"),
        ("m", 3, "http://pool/v2/models/m/versions/3"),
        ("a/b c", None, "http://pool/v2/models/a%2Fb%20c"),
    ],
)
def test_the_name_of_a_model_is_one_part_of_the_url(model: str, version: int | None, url: str) -> None:
    requests = ModelRequests("http://pool/", 30.0, Retries())
    assert requests.metadata(model, version, requests.deadline()).url == url


def test_metadata_is_kept_per_version() -> None:
    requests = ModelRequests("http://pool", 30.0, Retries())
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]}'
    found = requests.received_metadata("m", 1, Response(200, {}, body))
    assert [(one.name, one.datatype, one.shape) for one in found.inputs] == [("x", "FP32", (3,))]
    assert requests.known("m", 1) == found
    assert requests.known("m", 2) is None


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"inputs": [{"name": "x"}]}'])
def test_metadata_of_another_protocol_is_refused(body: bytes) -> None:
    requests = ModelRequests("http://pool", 30.0, Retries())
    with pytest.raises(ClusterError, match="does not follow the Open Inference Protocol v2"):
        requests.received_metadata("m", None, Response(200, {}, body))
