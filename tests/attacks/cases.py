"""Attack table: requests of hostile or broken clients, and the expected responses. Sends nothing itself.

Three fronts run this table: `protocol` (our protocol class: the product), `plain` (uvicorn's own with the ASGI app
behind it: as in the portable profile) and `haproxy` (the whole path). `status` applies to all of them; if another front
is laxer, or refuses differently, its own status is next to it. A 5xx status is never correct.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MAX_BODY_BYTES = 1 << 20
"""Body limit of the servers under attack."""

LIVE = b"/v2/health/live"
INFER = b"/v2/models/linear/infer"
ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
BODY = json.dumps(ROW).encode()
OURS = b"attack"
"""Request id of a case's regular request."""
HIDDEN = b"smuggled"
"""Request id that a case tries to smuggle; no response may have it."""

Status = frozenset[int]
NOTHING = 0
"""Represents a connection that is closed without a response, in sets of statuses."""


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        name: description of the fault.
        pieces: the bytes; several pieces only where the whole would be large.
        status: right answers to the first request.
        then: what happens to the connection: `close`, `keep` (the next request is answered) or `any` of the two.
        more: statuses of further answers to these bytes.
        plain, haproxy: what these fronts may answer besides.
        plain_then, haproxy_then: as `then`, where it differs; `refuse`: one more answer, a 400, and the end.
        fault_of_uvicorn: behavior of the plain front; the case is then expected to fail there.
        check: looks at the body of the answer, if its status is the first of `status`.
        ends_sending: the client half-closes after its bytes.
        continues: whether an interim answer (100) must, or must not come; None: may.
    """

    name: str
    pieces: tuple[bytes, ...]
    status: Status
    then: Literal["close", "keep", "any"] = "keep"
    more: tuple[int, ...] = ()
    plain: Status = frozenset()
    haproxy: Status = frozenset()
    plain_then: Literal["close", "keep", "any"] | None = None
    haproxy_then: Literal["close", "keep", "any", "refuse"] | None = None
    fault_of_uvicorn: str | None = None
    check: Callable[[bytes], bool] | None = None
    ends_sending: bool = False
    continues: bool | None = False


def request(
    method: bytes = b"POST",
    target: bytes = INFER,
    lines: Sequence[bytes] = (),
    body: bytes = b"",
    *,
    version: bytes = b"HTTP/1.1",
    host: bytes | None = b"Host: a",
    id: bytes = OURS,
    length: bool = True,
) -> bytes:
    """A valid request except for the arguments; `length` adds the Content-Length of a body."""
    given = [b"x-request-id: " + id, *lines]
    if host is not None:
        given.insert(0, host)
    if length and (body or method == b"POST"):
        given.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([b" ".join([method, target, version]), *given, b"", b""]) + body


def chunked(body: bytes, *lines: bytes, **more: Any) -> bytes:
    """A request whose body is these chunks as they are."""
    return request(lines=(b"Transfer-Encoding: chunked", *lines), length=False, **more) + body


SMUGGLED = request(b"GET", LIVE, id=HIDDEN)
OK, BAD, LARGE_HEAD, TOO_LARGE = frozenset({200}), frozenset({400}), frozenset({431}), frozenset({413})
NO_SUCH, NOT_ALLOWED = frozenset({404}), frozenset({405})


def bad_head(name: str, data: bytes, **more: Any) -> Case:
    """The message itself is broken: 400, and nothing of the connection can be trusted any more."""
    return Case(name, (data,), **{"status": BAD, "then": "close", **more})


def bad_line(name: str, line: bytes, behind: bytes = SMUGGLED, **more: Any) -> Case:
    return bad_head(name, request(b"GET", LIVE, [line]) + behind, **more)


def bad_length(name: str, value: bytes, **more: Any) -> Case:
    return bad_head(f"Content-Length {name}", request(lines=[b"Content-Length: " + value], length=False) + BODY, **more)


# HAProxy merges equal lengths and drops the length of chunked bodies, as RFC 9110 8.6 and RFC 9112 6.3 allow;
# the head that it forwards is unambiguous.
FRAMING = [
    bad_head(
        "length and chunks",
        request(lines=[b"Content-Length: 4", b"Transfer-Encoding: chunked"], length=False)
        + b"0\r\n\r\n" + SMUGGLED,
        haproxy_then="any",
    ),
    bad_head(
        "chunks and length",
        request(lines=[b"Transfer-Encoding: chunked", b"Content-Length: 4"], length=False)
        + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
        haproxy=OK,
        haproxy_then="any",
    ),
    bad_head(
        "length twice, the same",
        request(lines=[b"Content-Length: %d" % len(BODY)] * 2, length=False) + BODY,
        haproxy=OK,
        haproxy_then="any",
    ),
    bad_head(
        "length twice, two values",
        request(lines=[b"Content-Length: %d" % len(BODY), b"Content-Length: 0"], length=False) + BODY,
    ),
    bad_length("as a list", b"%d, %d" % (len(BODY), len(BODY)), haproxy=OK, haproxy_then="any"),
    bad_length("negative", b"-5"),
    bad_length("with a plus", b"+5"),
    bad_length("in hex", b"0x5"),
    bad_length("in float", b"1e2"),
    bad_length("with an underscore", b"1_0"),
    bad_length("empty", b""),
    bad_length("beyond 64 bits", b"18446744073709551621"),
    bad_length("of 400 digits", b"9" * 400),
    bad_length("in another script", "٥".encode()),
    Case(
        "a length over the limit",
        (request(lines=[b"Content-Length: 9999999999"], length=False) + BODY,),
        TOO_LARGE,
        "close",
        haproxy=frozenset({408}),  # it waits until a buffer is full, or the time for that is up
    ),
    bad_head("coding that is not chunked", request(lines=[b"Transfer-Encoding: identity"], length=False) + BODY),
    bad_head("coding that looks like chunked", request(lines=[b"Transfer-Encoding: xchunked"], length=False) + BODY),
    bad_head("coding with a vertical tab", request(lines=[b"Transfer-Encoding: \x0bchunked"], length=False) + b"0\r\n\r\n"),
    bad_head("chunked before another coding", request(lines=[b"Transfer-Encoding: chunked, gzip"], length=False) + BODY),
    bad_head("space before the colon of the coding", request(lines=[b"Transfer-Encoding : chunked"]) + b"0\r\n\r\n"),
    bad_head("chunk terminator that is not CRLF", chunked(b"5\r\nhelloXX0\r\n\r\n" + SMUGGLED)),
    bad_head("chunk terminator of LF only", chunked(b"5\r\nhello\n0\r\n\r\n" + SMUGGLED)),
    bad_head("chunk size ended by LF only", chunked(b"5\nhello\r\n0\r\n\r\n" + SMUGGLED)),
    bad_head("chunk size negative", chunked(b"-5\r\nhello\r\n0\r\n\r\n")),
    bad_head("chunk size with a plus", chunked(b"+5\r\nhello\r\n0\r\n\r\n")),
    bad_head("chunk size with 0x", chunked(b"0x5\r\nhello\r\n0\r\n\r\n")),
    bad_head("chunk size without a digit", chunked(b"\r\nhello\r\n0\r\n\r\n")),
    bad_head("chunk size beyond 64 bits", chunked(b"1" + b"0" * 16 + b"5\r\nhello\r\n0\r\n\r\n")),
    bad_head("chunk with a bare CR in its extension", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n")),
    bad_head("end of chunks without its empty line", chunked(b"0\r\nGET / HTTP/1.1\r\n\r\n")),
    Case(
        "garbage after the body",
        (request(body=BODY) + b"garbage\r\n\r\n",),
        OK,
        "close",
        more=(400,),
        fault_of_uvicorn="it refuses the garbage in the place of the answer",
    ),
    Case("a request after the body of a GET", (request(b"GET", LIVE, [b"Content-Length: 5"], b"") + b"hello",), OK),
    Case("a body for a path that is not there", (request(target=b"/nowhere", body=BODY),), NO_SUCH),
    Case("a body for a route that takes none", (request(target=LIVE, body=BODY),), NOT_ALLOWED),
    Case("chunk extension, small", (chunked(b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),), OK),
    Case(
        "chunk extension of 200 kB",
        (chunked(b"5;" + b"a" * 200_000 + b"\r\nhello\r\n0\r\n\r\n"),),
        BAD,
        "any",
        haproxy=frozenset({408, NOTHING}),
    ),
    Case(
        "2,000 chunks with extensions of 100 bytes",
        (chunked(b"") + (b"1;" + b"a" * 100 + b"\r\nx\r\n") * 2_000 + b"0\r\n\r\n",),
        BAD,
        "any",
    ),
    Case(
        "a trailer that says another id",
        (chunked(b"%x\r\n%b\r\n0\r\nx-request-id: %b\r\n\r\n" % (len(BODY), BODY, HIDDEN)),),
        OK,
        fault_of_uvicorn="it adds trailers to the headers",
    ),
    Case(
        "a trailer that says another length",
        (chunked(b"%x\r\n%b\r\n0\r\nContent-Length: 3\r\n\r\n" % (len(BODY), BODY)),),
        OK | BAD,
        "any",
    ),
    Case(
        "10,000 trailers",
        (chunked(b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY) + b"a: b\r\n" * 10_000 + b"\r\n"),),
        LARGE_HEAD | BAD,
        "close",
        plain=OK,
        plain_then="any",
    ),
]  # fmt: skip

HEADS = [
    # HAProxy unfolds it into one line, as RFC 9112 5.2 allows.
    bad_line("folded header", b"a: b\r\n c", b"", haproxy=OK, haproxy_then="any"),
    bad_head("line ends of LF only", request(b"GET", LIVE).replace(b"\r\n", b"\n"), haproxy=OK, haproxy_then="any"),
    bad_head("header line ended by LF only", request(b"GET", LIVE, [b"a: b\nc: d"]), haproxy=OK, haproxy_then="any"),
    bad_line("bare CR in a value", b"a: b\rc: d"),
    bad_line("space before the colon", b"a : b"),
    bad_line("tab before the colon", b"a\t: b"),
    bad_line("line without a colon", b"a"),
    bad_line("empty name", b": b"),
    bad_line("name that is not a token", b"a(b): c"),
    bad_line("name that is not ASCII", "ä: b".encode()),
    bad_line("NUL in a value", b"a: b\0c"),
    bad_line("NUL in a name", b"a\0b: c"),
    bad_line("control character in a value", b"a: b\x01c", b"", haproxy_then="any"),
    bad_head("first line begins with a space", b"GET " + LIVE + b" HTTP/1.1\r\n Host: a\r\n\r\n"),
    bad_head("no Host", request(b"GET", LIVE, host=None), plain=OK, plain_then="any", haproxy=OK, haproxy_then="any"),
    bad_head("two Hosts", request(b"GET", LIVE, [b"Host: b"]), plain=OK, plain_then="any"),
    *(
        bad_head(
            f"Host {host!r}", request(b"GET", LIVE, host=b"Host: " + host),
            plain=OK, plain_then="any", haproxy=OK, haproxy_then="any",
        )
        for host in (b"a/b?", b"a b", b"u@a", b"a:b", b"a#", b"a\\b", b"<a>", b"a,b")
    ),
    *(
        Case(f"Host {host!r}", (request(b"GET", LIVE, host=b"Host: " + host),), OK)
        for host in (b"a", b"a.b:80", b"[::1]:80", b"")
    ),
    Case("HTTP/1.0 without Host", (request(b"GET", LIVE, version=b"HTTP/1.0", host=None),), OK, "close"),
    Case("HTTP/1.0 with keep-alive", (request(b"GET", LIVE, [b"Connection: keep-alive"], version=b"HTTP/1.0"),), OK, "any"),
    bad_head(
        "chunks in HTTP/1.0",
        chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), version=b"HTTP/1.0"),
        plain=OK, haproxy=OK,
    ),
    *(
        bad_head(
            f"a head of {name}", request(b"GET", LIVE, lines),
            status=LARGE_HEAD, plain=OK, plain_then="any", haproxy=BAD,
        )
        for name, lines in (
            ("one header of 64 kB", [b"a: " + b"b" * 65536]),
            ("one name of 64 kB", [b"a" * 65536 + b": b"]),
            ("10,000 headers", [b"a%d: b" % n for n in range(10_000)]),
            ("10,000 equal headers", [b"a: b"] * 10_000),
        )
    ),
    Case("a cookie of 4 kB", (request(b"GET", LIVE, [b"Cookie: " + b"b" * 4096]),), OK),
    *(
        # HAProxy accepts any x.y that is not below 1.0, and forwards 1.1.
        bad_head(
            f"version {version.decode()}",
            request(b"GET", LIVE, version=version),
            plain=OK,
            plain_then="any",
            haproxy=OK if version in (b"HTTP/2.0", b"HTTP/3.0") else frozenset(),
            haproxy_then="any",
        )
        for version in (b"HTTP/0.9", b"HTTP/2.0", b"HTTP/3.0", b"HTTP/1.", b"HTTP/11", b"http/1.1", b"RTSP/1.0", b"ICY/1.1")
    ),
    bad_head("simple request of HTTP/0.9", b"GET " + LIVE + b"\r\n\r\n", plain=OK, plain_then="any"),
    bad_head(
        "preface of HTTP/2",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        haproxy=frozenset({404}),  # for the bytes it parses as a first request; the second is not a request
        haproxy_then="refuse",
    ),
    bad_head("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n"),
    bad_head("bytes of no protocol", bytes(range(256)) * 4),
    bad_head("empty method", b" " + LIVE + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    bad_head("method that is not known", request(b"FOO", LIVE), status=BAD | NOT_ALLOWED, then="any"),
    bad_head("method in small letters", request(b"get", LIVE), status=BAD | NOT_ALLOWED, then="any"),
    bad_head("method of 20 kB", request(b"A" * 20_000, LIVE), status=BAD | LARGE_HEAD),
    *(
        Case(f"method {method.decode()}", (request(method, LIVE),), NOT_ALLOWED)
        for method in (b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE")
    ),
    Case("method CONNECT", (request(b"CONNECT", b"a:80"),), BAD | NO_SUCH | NOT_ALLOWED, "any"),
    Case(
        "Expect: 100-continue with the body immediately",
        (request(lines=[b"Expect: 100-continue"], body=BODY),), OK, continues=None,
    ),
    Case(
        "Expect: 100-continue, and a body that will not be taken",
        (request(lines=[b"Expect: 100-continue", b"Content-Length: 9999999999"], length=False),),
        TOO_LARGE, "close", haproxy=frozenset({408}), haproxy_then="any",
    ),
    Case(
        "an unknown expectation",
        (request(lines=[b"Expect: wonders"], body=BODY),), OK | {417}, "any",
    ),
    Case(
        "Expect: 100-continue in HTTP/1.0",
        (request(lines=[b"Expect: 100-continue"], body=BODY, version=b"HTTP/1.0"),), OK, "close", continues=None,
    ),
    # Upgrades are ignored, as RFC 9110 7.8 allows. uvicorn accepts a websocket, which the app then refuses with 403.
    Case(
        "upgrade to a websocket",
        (request(b"GET", LIVE, [
            b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]),),
        OK, plain=frozenset({400, 403}), plain_then="any", haproxy_then="any",
    ),
    Case(
        "upgrade to h2c",
        (request(b"GET", LIVE, [
            b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        ]),),
        OK, plain_then="any", haproxy_then="any",
    ),
    Case(
        "upgrade of a request with a body",
        (request(lines=[b"Connection: Upgrade", b"Upgrade: h2c"], body=BODY),),
        OK, haproxy_then="any", fault_of_uvicorn="it takes the body for bytes of the other protocol",
    ),
    Case("Connection: close", (request(b"GET", LIVE, [b"Connection: close"]) + SMUGGLED,), OK, "close"),
    Case("Connection: close on an inference", (request(lines=[b"Connection: close"], body=BODY) + SMUGGLED,), OK, "close"),
    # A half-closed connection looks like one whose client has disconnected. Reads are answered; inference may be
    # cancelled, to save the time of other clients.
    Case("the client half-closes after a GET", (request(b"GET", LIVE),), OK, "close", plain=frozenset({NOTHING}), ends_sending=True),
    Case(
        "the client half-closes after its request",
        (request(body=BODY),), OK | {NOTHING}, "close", haproxy=BAD, ends_sending=True,
    ),
    Case(
        "the client half-closes in the middle of a head",
        (request(body=BODY)[:60],), BAD | {NOTHING}, "close", ends_sending=True,
    ),
    Case(
        "the client half-closes in the middle of a body",
        (request(body=BODY)[:-5],), BAD | {NOTHING}, "close", ends_sending=True,
    ),
    Case("empty lines before the request", (b"\r\n\r\n" + request(b"GET", LIVE),), OK, haproxy=BAD, haproxy_then="any"),
]  # fmt: skip


def target(name: str, path: bytes, status: Status, then: Literal["close", "keep", "any"] = "keep", **more: Any) -> Case:
    return Case(f"target {name}", (request(b"GET", path),), status, then, **more)


TARGETS = [
    target("in absolute form", b"http://a" + LIVE, OK),
    target("in absolute form with another host", b"http://elsewhere.example" + LIVE, OK, haproxy=BAD, haproxy_then="any"),
    target("in absolute form without a path", b"http://a", NO_SUCH | BAD, "any"),
    target("with two slashes", b"//v2/health/live", NO_SUCH),
    target("with a slash at the end", b"/v2/health/live/", NO_SUCH),
    target("without its slash", b"v2/health/live", BAD, "close", haproxy=NO_SUCH, haproxy_then="any"),
    target("that is a star", b"*", BAD | NO_SUCH, "any"),
    target("with a query", LIVE + b"?a=b&c", OK),
    target("with a fragment", LIVE + b"#a", BAD, "close", plain=OK, plain_then="any"),
    target("with %2f", b"/v2%2Fhealth/live", NO_SUCH),
    target("with percent-encoded words", b"/v2/%68ealth/live", NO_SUCH),
    target("with parameters", b"/v2;a=b/health/live", NO_SUCH),
    target("with percent-encoded letters", b"/v2/models/line%61r", OK),
    target("with dot segments", b"/v2/models/../health/live", NO_SUCH),
    target("with percent-encoded dot segments", b"/v2/models/%2e%2e/health/live", NO_SUCH),
    target("with dot segments in a version", b"/v2/models/linear/versions/..%2f1", BAD | NO_SUCH),
    target("with dot segments to a file", b"/v2/models/..%2f..%2f..%2fetc%2fpasswd", NO_SUCH | BAD),
    target("with %00", b"/v2/models/linear%00", NO_SUCH | BAD, "any"),
    target("with a header in it", b"/v2/models/a%0d%0ax-request-id:%20smuggled", NO_SUCH),
    target("with a broken percent", b"/v2/models/%zz", NO_SUCH | BAD, "any"),
    target("that is no UTF-8", b"/v2/models/%ff%fe", NO_SUCH | BAD, "any"),
    target("with bytes over 127", "/v2/models/ä".encode(), NO_SUCH | BAD, "any"),
    target("with NUL", b"/v2/\0", BAD, "close"),
    target("with a space", b"/v2/health live", BAD, "close"),
    target("with a tab", b"/v2/health\tlive", BAD, "close"),
    target("of 100 kB", b"/v2/" + b"a" * 100_000, LARGE_HEAD | {414}, "close", plain=BAD, haproxy=BAD),
    target("with a query of 100 kB", LIVE + b"?" + b"a" * 100_000, LARGE_HEAD | {414}, "close", plain=BAD, haproxy=BAD),
    target("with 2,000 segments", b"/v2/models" + b"/a" * 2_000, NO_SUCH),
    target("that asks for version 10^30", b"/v2/models/linear/versions/1" + b"0" * 30, BAD),
]  # fmt: skip


def body(name: str, data: bytes, status: Status = BAD, lines: Sequence[bytes] = (), **more: Any) -> Case:
    """A complete message with a bad body: refused, and the connection stays open."""
    return Case(name, (request(lines=lines, body=data),), status, **more)


def tensor(shape: str = "[1, 3]", data: str = "[1, 2, 3]", datatype: str = '"FP32"', name: str = '"x"') -> bytes:
    return f'{{"inputs": [{{"name": {name}, "shape": {shape}, "datatype": {datatype}, "data": {data}}}]}}'.encode()


X = '{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}'
DEPTH = 100_000
DIGITS = "1" + "0" * 100_000

BODIES = [
    body("no body", b""),
    body("body that is not JSON", b"hello"),
    body("JSON that ends early", BODY[:-1]),
    body("JSON with something behind it", BODY + b"x"),
    body("JSON twice", BODY + BODY),
    body("UTF-16", BODY.decode().encode("utf-16")),
    body("byte order mark", b"\xef\xbb\xbf" + BODY),
    body("bytes that are no UTF-8", BODY.replace(b'"x"', b'"\xff"')),
    body("NUL bytes", b"\0" * 1000),
    *(body(f"top level {value}", value.encode()) for value in ("[]", "null", "3", '"x"', "true")),
    body("nested 10^5 deep, lists", b"[" * DEPTH + b"]" * DEPTH),
    body("nested 10^5 deep, unclosed", b"[" * DEPTH),
    body("nested 10^5 deep, objects", b'{"a":' * DEPTH + b"1" + b"}" * DEPTH),
    body("data nested 1,000 deep", tensor(data="[" * 1000 + "1" + "]" * 1000)),
    body("100,000 keys", b"{" + b",".join(b'"%d":1' % n for n in range(100_000)) + b"}", BAD | TOO_LARGE, then="any"),
    body("100,000 inputs", b'{"inputs": [' + b",".join([b"{}"] * 100_000) + b"]}"),
    body("100,000 inputs of one name", ('{"inputs": [' + ",".join([X] * 10_000) + "]}").encode()),
    body("integer of 10^5 digits", tensor(data=f"[{DIGITS}, 2, 3]")),
    body("negative integer of 10^5 digits", tensor(data=f"[-{DIGITS}, 2, 3]")),
    body("fraction of 10^5 digits", tensor(data=f"[0.{DIGITS}, 2, 3]"), OK | BAD),
    body("exponent of 10^5 digits", tensor(data=f"[1e{DIGITS}, 2, 3]")),
    body("shape of 10^5 digits", tensor(shape=f"[{DIGITS}, 3]")),
    body("1e400", tensor(data="[1e400, 2, 3]")),
    body("a key twice, the last one is right", ('{"inputs": 3, "inputs": [' + X + "]}").encode(), OK),
    body("a key twice, the last one is wrong", ('{"inputs": [' + X + '], "inputs": 3}').encode()),
    body("lone surrogate in an id", b'{"id": "\\ud800", ' + BODY[1:]),
    body("lone surrogate in a name", tensor(name='"\\udfff"')),
    *(
        body(f"{literal} in", tensor(data=f"[{literal}, 2, 3]"))
        for literal in ("NaN", "Infinity", "-Infinity", "nan", "inf")
    ),
    body("infinity out", tensor(data="[3e38, -3e38, 1]"), OK, check=lambda body: json.loads(body)["outputs"][0]["data"] == [None, None, 2.0]),
    body("null where nothing may be missing", tensor(data="[null, 2, 3]")),
    *(
        body(f"shape {shape}", tensor(shape=shape))
        for shape in (
            "[1000000000, 1000000000]", "[1000000000, 3]", "[4294967296, 4294967296]", "[9223372036854775807, 3]",
            "[18446744073709551617, 3]", "[-1, 3]", "[-1, -3]", "[1, -3]", "[0, 3]", "[3]", "[]", "[1, 3, 1]", "[3, 1]",
            "[1.0, 3]", "[1.5, 2]", "[true, 3]", '["1", 3]', "[null, 3]", "[[1], 3]", "null", "3", '"1,3"', "{}",
        )
    ),
    body("shape of 10^5 dimensions", tensor(shape="[" + ",".join(["1"] * 100_000) + "]")),
    *(
        body(f"datatype {datatype}", tensor(datatype=datatype))
        for datatype in ('"FP64"', '"INT64"', '"BYTES"', '"fp32"', '""', "null", "32", '["FP32"]', '"FP16"')
    ),
    *(
        body(f"data {data[:20]}", tensor(data=data))
        for data in ("null", "{}", '"123"', "3", "[1, 2]", "[1, 2, 3, 4]", '["1", 2, 3]', "[true, 2, 3]", "[[1, 2], [3]]", "[[1, 2, 3], 4]", "[{}, 2, 3]")
    ),
    *(body(f"name {name}", tensor(name=name)) for name in ('"y"', '""', "null", "3", '["x"]', '"x\\u0000"', '"X"')),
    body("an input twice", f'{{"inputs": [{X}, {X}]}}'.encode()),
    body("no inputs", b'{"inputs": []}'),
    body("inputs that are not a list", b'{"inputs": {"x": 1}}'),
    body("inputs that are not objects", b'{"inputs": [1, 2]}'),
    body("an output that is not there", (f'{{"outputs": [{{"name": "z"}}], "inputs": [{X}]}}').encode()),
    body("outputs that are not a list", (f'{{"outputs": "y", "inputs": [{X}]}}').encode()),
    body("an id that is not a string", b'{"id": 7, ' + BODY[1:]),
    body("an id of 100 kB", b'{"id": "' + b"a" * 100_000 + b'", ' + BODY[1:]),
    body("parameters that are not an object", b'{"parameters": [1], ' + BODY[1:]),
    body("parameters with an object in them", b'{"parameters": {"a": {"b": 1}}, ' + BODY[1:]),
    body("a body over the limit", b" " * (MAX_BODY_BYTES + 1), TOO_LARGE, then="close", haproxy_then="any"),
    Case(
        "a body over the limit, in chunks",
        (chunked(b""), *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 20),
        TOO_LARGE,
        "close",
        haproxy_then="any",
    ),
    *(
        body(f"a deadline of {value!r}", BODY, lines=[b"x-request-timeout-ms: " + value])
        for value in (b"0", b"-5", b"soon", b"1e3", b"9" * 40, b"")
    ),
]  # fmt: skip


def bomb(compress: Callable[[bytes], bytes], size: int = 8 << 20) -> bytes:
    """About a thousandth of its decompressed size."""
    return compress(b" " * size)


def gzip_bytes(data: bytes) -> bytes:
    return gzip.compress(data, 9)


def encoded(name: str, encoding: bytes, data: bytes, status: Status = BAD, **more: Any) -> Case:
    return body(f"{name} ({encoding.decode()})", data, status, [b"Content-Encoding: " + encoding], **more)


GZIPPED = gzip_bytes(BODY)
ENCODINGS = [
    encoded("bomb of 1000:1", b"gzip", bomb(gzip_bytes), TOO_LARGE | BAD, then="any"),
    encoded("bomb of 1000:1", b"deflate", bomb(zlib.compress), TOO_LARGE | BAD, then="any"),
    encoded("bomb of many members", b"gzip", bomb(gzip_bytes, 1 << 19) * 16, TOO_LARGE | BAD, then="any"),
    encoded("bomb in a bomb", b"gzip", gzip_bytes(bomb(gzip_bytes)), BAD),
    encoded("bomb in a bomb", b"gzip, gzip", gzip_bytes(bomb(gzip_bytes)), BAD),
    encoded("two encodings", b"deflate, gzip", gzip_bytes(zlib.compress(BODY))),
    encoded("an encoding that is not offered", b"br", b"\x0b\x02\x80" + BODY, BAD | {415}),
    encoded("an encoding that is not offered", b"zstd", b"\x28\xb5\x2f\xfd" + BODY, BAD | {415}),
    encoded("an unknown encoding", b"x-pack", BODY, BAD | {415}),
    encoded("data that is not compressed", b"gzip", BODY),
    encoded("data that is not compressed", b"deflate", BODY),
    encoded("data cut off", b"gzip", GZIPPED[:-9]),
    encoded("data with a wrong checksum", b"gzip", GZIPPED[:-8] + b"\0\0\0\0" + GZIPPED[-4:]),
    encoded("data with something behind it", b"gzip", GZIPPED + b"hello"),
    encoded("data cut off", b"deflate", zlib.compress(BODY)[:-3]),
    encoded("nothing", b"gzip", b""),
    body("Content-Encoding twice", GZIPPED, lines=[b"Content-Encoding: gzip", b"Content-Encoding: gzip"]),
    *(
        body(f"Inference-Header-Content-Length {value!r}", BODY, lines=[b"Inference-Header-Content-Length: " + value])
        for value in (b"-1", b"+5", b"0x5", b"five", b"", b"5.0", b"%d" % (len(BODY) + 1), b"9" * 30, b"5")
    ),
    body(
        "Inference-Header-Content-Length twice", BODY,
        lines=[b"Inference-Header-Content-Length: %d" % len(BODY), b"Inference-Header-Content-Length: 5"],
    ),
]  # fmt: skip


def pipeline(*targets: bytes) -> bytes:
    """Requests in one packet, each with a number as its id; hot ones have a body."""
    return b"".join(
        request(body=BODY, id=b"%d" % number) if path == INFER else request(b"GET", path, id=b"%d" % number)
        for number, path in enumerate(targets)
    )


PIPELINES = {
    "ten hot": (INFER,) * 10,
    "ten cold": (LIVE,) * 10,
    "hot and cold in turn": (INFER, LIVE) * 5,
    "hot behind cold": (b"/v2", b"/v2/models/linear", LIVE, b"/nowhere", INFER, INFER, b"/v2", INFER, LIVE, INFER),
    "a hundred": (INFER, INFER, LIVE, INFER, b"/v2") * 20,
}

TABLE = [*FRAMING, *HEADS, *TARGETS, *BODIES, *ENCODINGS]
