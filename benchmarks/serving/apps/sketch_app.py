"""The bare sketch: a protocol class answers the hot route with a callback batcher, and pays no duty of a server.

No ids, deadlines, counts, metrics, limits, back-pressure, cancellation or drain; one model. It shows what those cost.
As a program it is one uvicorn process; sketch_replica.py puts it into a replica of Ray Serve.
"""

import asyncio
import os

import httptools
import numpy as np
import orjson
import simdjson
import uvicorn
from raw_session import Model
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HOT = os.environ.get("BENCH_PATH", "/v2/models/bench/infer").encode()
MAX_BATCH = 64
model = Model()
parser = simdjson.Parser()
KIND = "d" if model.dtype is np.float32 else "i"
WIDE = np.float64 if model.dtype is np.float32 else np.int64


class Batcher:
    """Armed once per turn of the loop: all requests that arrived in it share one run."""

    def __init__(self):
        self.waiting = []
        self.loop = asyncio.get_running_loop()

    def put(self, rows, done):
        if not self.waiting:
            self.loop.call_soon(self.run)
        self.waiting.append((rows, done))

    def run(self):
        batch, self.waiting = self.waiting[:MAX_BATCH], self.waiting[MAX_BATCH:]
        if self.waiting:
            self.loop.call_soon(self.run)
        for (_, done), result in zip(batch, model.run_all([rows for rows, _ in batch]), strict=True):
            done(result)


batcher = None


class Protocol(HttpToolsProtocol):
    hot = False

    def on_headers_complete(self):
        self.hot = self.url == HOT
        if self.hot:
            self.chunks = []
        else:
            super().on_headers_complete()

    def on_body(self, body):
        if self.hot:
            self.chunks.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self):
        if not self.hot:
            super().on_message_complete()
            return
        global batcher
        if batcher is None:
            batcher = Batcher()
        self._unset_keepalive_if_required()
        body = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        batcher.put(read(body), self.answer)

    def answer(self, result):
        body = orjson.dumps({"model_name": "bench", "outputs": [{"name": "y", "shape": result.shape, "datatype": "FP32", "data": result.ravel()}]}, option=orjson.OPT_SERIALIZE_NUMPY)  # fmt: skip
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )


def read(body):
    tensor = parser.parse(body)["inputs"].at_pointer("/0")
    data = np.frombuffer(tensor["data"].as_buffer(of_type=KIND), WIDE).astype(model.dtype)
    return data.reshape(tensor["shape"].as_list())


async def app(scope, receive, send):
    """Everything else: ready."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    assert httptools.__version__
    port = int(os.environ["BENCH_PORT"])
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        http=Protocol,
        loop="uvloop",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
