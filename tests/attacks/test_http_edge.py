"""Every case of the table on every front: the expected response, never a 5xx, and never another client's response."""

import logging

import pytest

from tests.attacks.cases import BODY, HIDDEN, INFER, LIVE, NOTHING, OURS, PIPELINES, TABLE, Case, pipeline, request
from tests.attacks.conftest import Front
from tests.attacks.raw import Answer, Talk

PROBE = b"probe"


def exchange(front: Front, case: Case) -> tuple[list[Answer], bool]:
    """Sends a case, then a probe on the same connection: returns all responses, and whether it was closed."""
    answers: list[Answer] = []
    with Talk(front.port) as talk:
        # A connection that may live on after a refusal does so only once the body is through.
        talk.send(case.pieces, even_if_answered=front.name == "haproxy")
        if case.ends_sending:
            talk.end_sending()
        for _ in range(1 + len(case.more)):
            answer = talk.read()
            if answer is None:
                return answers, True
            answers.append(answer)
        # HAProxy requests the body itself: it needs a full buffer before it selects a replica.
        assert front.name == "haproxy" or case.continues in (None, talk.num_continues > 0)
        if front.then(case) == "refuse":
            answer = talk.read()
            assert answer is None or answer.status == 400
        if front.then(case) in ("close", "refuse"):
            assert talk.is_closed(), "the connection stays open, or something follows the answer"
            return answers, True
        talk.send([request(b"GET", LIVE, id=PROBE)])
        answer = talk.read()
        if answer is None:
            return answers, True
        assert (answer.id, answer.status) == (PROBE.decode(), 200), "the next request got another one's answer"
        return answers, False


def check(front: Front, case: Case) -> None:
    answers, is_closed = exchange(front, case)
    statuses = [answer.status for answer in answers]
    assert (statuses or [NOTHING])[0] in front.status(case), (statuses, answers and answers[0].body[:300])
    assert statuses[1:] == list(case.more[: len(statuses) - 1])
    assert max(statuses, default=0) < 500
    assert HIDDEN.decode() not in [answer.id for answer in answers]
    if not is_closed or front.then(case) == "keep":
        assert not is_closed, "the connection was closed"
    for answer in answers:
        if answer.status >= 400 and answer.id == OURS.decode():
            assert answer.body.startswith(b'{"error":"'), answer.body[:200]
    if case.check is not None and statuses[0] == 200:
        assert case.check(answers[0].body), answers[0].body[:300]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name[:60])
def test_an_attack_gets_its_answer_and_no_other(
    front: Front, case: Case, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if front.name == "plain" and case.fault_of_uvicorn:
        request.applymarker(pytest.mark.xfail(reason=f"uvicorn: {case.fault_of_uvicorn}"))
    check(front, case)
    failures = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert failures == [], "something failed unexpectedly"


@pytest.mark.parametrize("name", PIPELINES)
def test_requests_in_one_packet_are_answered_in_order(front: Front, name: str) -> None:
    targets = PIPELINES[name]
    with Talk(front.port) as talk:
        talk.send([pipeline(*targets)], even_if_answered=True)
        answers = [talk.read() for _ in targets]
    assert [answer and answer.id for answer in answers] == [str(number) for number in range(len(targets))]
    assert [answer and answer.status for answer in answers] == [404 if path == b"/nowhere" else 200 for path in targets]


def test_a_bad_message_in_a_pipeline_is_refused_in_its_turn(front: Front) -> None:
    if front.name == "plain":
        pytest.skip("uvicorn refuses it immediately, and the responses before it are lost")
    good = pipeline(INFER, LIVE, INFER)
    with Talk(front.port) as talk:
        talk.send([good + b"garbage\r\n\r\n" + good], even_if_answered=True)
        answers = [talk.read() for _ in range(4)]
        assert [answer and answer.status for answer in answers] == [200, 200, 200, 400]
        assert talk.is_closed()


def test_a_client_that_closes_in_a_pipeline_gets_no_answer_after_that(front: Front) -> None:
    last = request(b"GET", LIVE, [b"Connection: close"], id=b"last")
    with Talk(front.port) as talk:
        talk.send([pipeline(INFER) + last + pipeline(LIVE, INFER)], even_if_answered=True)
        assert [talk.read().id, talk.read().id] == ["0", "last"]  # type: ignore[union-attr]
        assert talk.is_closed()


@pytest.mark.parametrize("path", [LIVE, b"/v2/models/linear", b"/nowhere"])
def test_a_head_is_answered_without_a_body(front: Front, path: bytes) -> None:
    with Talk(front.port) as talk:
        talk.send([request(b"HEAD", path) + request(b"GET", LIVE, id=PROBE)], even_if_answered=True)
        assert (answer := talk.read(is_head=True)) is not None
        assert answer.status == (404 if path == b"/nowhere" else 200)
        assert (probe := talk.read()) is not None
        assert (probe.id, probe.status) == (PROBE.decode(), 200)


def test_a_client_that_waits_for_100_continue_gets_it_before_its_body(front: Front) -> None:
    head = request(lines=[b"Expect: 100-continue", b"Content-Length: %d" % len(BODY)], length=False)
    with Talk(front.port) as talk:
        talk.send([head])
        assert talk.wait_for_continue()
        talk.send([BODY], even_if_answered=True)
        assert (answer := talk.read()) is not None
        assert answer.status == 200


def test_a_request_sent_byte_by_byte_is_the_same_request(front: Front) -> None:
    data = request(body=BODY) + request(b"GET", LIVE, id=PROBE)
    with Talk(front.port) as talk:
        talk.send([data[index : index + 1] for index in range(len(data))], even_if_answered=True)
        assert [talk.read().id, talk.read().id] == [OURS.decode(), PROBE.decode()]  # type: ignore[union-attr]
