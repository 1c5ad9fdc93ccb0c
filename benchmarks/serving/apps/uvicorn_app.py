"""The ceiling of a plain Python server: raw ASGI, orjson, onnxruntime in the event loop, no batching."""

import orjson
from raw_session import Model

model = Model()
HEADERS = [(b"content-type", b"application/json")]


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = orjson.dumps(model.write(model.run(model.read(orjson.loads(body))))) if body else b"{}"
    headers = [*HEADERS, (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
