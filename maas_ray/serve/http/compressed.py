"""Compression of large responses, in a thread. Independent of sockets."""

from collections.abc import Callable

from maas_ray.errors import Overloaded
from maas_ray.serve.request.offload import Workers
from maas_ray.serve.request.response import Reply
from maas_ray.serve.wire.compression import MIN_BYTES, deflate


def compress(reply: Reply, accept_encoding: bytes, workers: Workers, done: Callable[[Reply], None]) -> None:
    """Passes a response to `done`: at once, or later in a form that the client accepts.

    Half a megabyte would block the loop for 15 ms. A response that no thread can compress now is sent as it is.

    Args:
        reply: the response.
        accept_encoding: the client's header; empty: no compression.
        workers: threads.
        done: called once on the loop.
    """
    if not accept_encoding or len(reply.body) < MIN_BYTES:
        done(reply)
        return

    def packed(result: tuple[bytes, bytes | None] | None, error: Exception | None) -> None:
        if result is None:
            done(reply)
            return
        body, encoding = result
        headers = reply.headers if encoding is None else (*reply.headers, (b"content-encoding", encoding))
        done(Reply(reply.status, headers, body))

    try:
        workers.submit(lambda stop: deflate(reply.body, accept_encoding), len(reply.body), packed)
    except Overloaded:
        done(reply)
