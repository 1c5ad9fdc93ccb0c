"""A process that stands for many replicas: listens on many ports of loopback and answers health checks as they do.

    python -m benchmarks.scale.listeners 500

Writes its ports as one line of JSON, then for each line that it reads the number of requests that it has answered.
"""

import asyncio
import json
import sys

_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 7\r\n\r\nsuccess"


class _Replica(asyncio.Protocol):
    answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while b"\r\n\r\n" in self._data:
            self._data = self._data.partition(b"\r\n\r\n")[2]
            self._transport.write(_ANSWER)  # type: ignore[attr-defined]
            _Replica.answered += 1


async def _listen(num_ports: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Replica, "127.0.0.1", 0, backlog=64) for _ in range(num_ports)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(_Replica.answered, flush=True)


if __name__ == "__main__":
    asyncio.run(_listen(int(sys.argv[1])))
