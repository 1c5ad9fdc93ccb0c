"""Compressed bodies: valid ones, refused ones, and bombs that end at the limit."""

import gzip
import tracemalloc
import zlib

import pytest

from maas_ray.errors import BadRequest, BodyTooLarge
from maas_ray.serve.wire.compression import MIN_BYTES, deflate, inflate

LIMIT = 1 << 20
BODY = b"".join(b"%d," % number for number in range(50_000))


def raw(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


FORMS = [(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", raw), (b"identity", bytes)]


@pytest.mark.parametrize(("encoding", "compress"), FORMS, ids=["gzip", "zlib", "raw", "identity"])
@pytest.mark.parametrize("body", [b"", b"a", BODY, bytes(LIMIT)], ids=["empty", "one", "text", "zeros"])
def test_a_decompressed_body_equals_the_original(encoding: bytes, compress: object, body: bytes) -> None:
    sent = compress(body)  # type: ignore[operator]
    assert inflate(sent, encoding, LIMIT) == body
    assert inflate(memoryview(sent), encoding.upper(), LIMIT) == body


@pytest.mark.parametrize(("encoding", "compress"), FORMS, ids=["gzip", "zlib", "raw", "identity"])
def test_one_byte_over_the_limit_is_too_large(encoding: bytes, compress: object) -> None:
    with pytest.raises(BodyTooLarge, match=str(LIMIT)):
        inflate(compress(bytes(LIMIT + 1)), encoding, LIMIT)  # type: ignore[operator]


@pytest.mark.parametrize(("encoding", "compress"), FORMS[:3], ids=["gzip", "zlib", "raw"])
def test_a_bomb_ends_at_the_limit_and_holds_no_more_memory(encoding: bytes, compress: object) -> None:
    bomb = compress(bytes(64 << 20))  # type: ignore[operator]
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            inflate(bomb, encoding, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("encoding", "compress"), FORMS[:3], ids=["gzip", "zlib", "raw"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda sent: sent[:-1], "truncated"),
        (lambda sent: sent[: len(sent) // 2], "truncated"),
        (lambda sent: b"", "truncated"),
        (lambda sent: sent + b"x", "bytes follow the end"),
        (lambda sent: sent + sent, "bytes follow the end"),
        (lambda sent: sent + bytes(100_000), "bytes follow the end"),
        (lambda sent: b"\xff" * 20, "the body is not (gzip|deflate)"),
    ],
    ids=["last byte", "half", "nothing", "one more", "two members", "padding", "garbage"],
)
def test_damaged_data_is_refused(encoding: bytes, compress: object, damage: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        inflate(damage(compress(BODY)), encoding, LIMIT)  # type: ignore[operator]


@pytest.mark.parametrize(("encoding", "compress"), FORMS[:2], ids=["gzip", "zlib"])
def test_a_wrong_checksum_is_refused(encoding: bytes, compress: object) -> None:
    sent = bytearray(compress(BODY))  # type: ignore[operator]
    sent[-1 if encoding == b"deflate" else -5] ^= 1
    with pytest.raises(BadRequest, match="incorrect data check"):
        inflate(bytes(sent), encoding, LIMIT)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (b"br", "'br': it is not supported"),
        (b"gzip, deflate", "only one encoding"),
        (b"gzip,gzip", "only one encoding"),
    ],
)
def test_other_encodings_are_refused(encoding: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        inflate(b"", encoding, LIMIT)


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (b"", None),
        (b"identity", None),
        (b"br", None),
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b"GZIP , deflate", b"gzip"),
        (b"gzip;q=0.5, deflate;q=0.8", b"deflate"),
        (b"gzip;q=0", None),
        (b"gzip;q=0, deflate;q=0.1", b"deflate"),
        (b"*", b"gzip"),
        (b"*;q=0", None),
        (b"gzip;q=0, *", b"deflate"),
        (b"identity, gzip;q=0.5", None),
        (b"identity;q=0.5, gzip", b"gzip"),
        (b"gzip;q=nan", None),
        (b"gzip;q=7", None),
        (b"gzip;q=x", None),
    ],
)
def test_answers_are_compressed_as_the_client_wants(accepted: bytes, expected: bytes | None) -> None:
    body, name = deflate(BODY, accepted)
    assert name == expected
    assert inflate(body, name or b"identity", len(BODY)) == BODY


def test_a_short_answer_is_not_compressed() -> None:
    assert deflate(b"a" * (MIN_BYTES - 1), b"gzip") == (b"a" * (MIN_BYTES - 1), None)
