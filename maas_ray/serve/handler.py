"""Answers requests that have been read: a head and a body in, a reply out. Knows no ASGI, no socket and no Ray.

Inference answers by callback, so that a protocol class can ask without a task per request; everything else is awaited.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter, time
from typing import Any, NamedTuple, Protocol

import orjson

from maas_ray.errors import BadRequest, BodyTooLarge, DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.autoscale import Meter
from maas_ray.serve.ended import Ended, Observer
from maas_ray.serve.head import Head, Header, Route
from maas_ray.serve.metrics import CONTENT_TYPE, OPENMETRICS_CONTENT_TYPE, exposition
from maas_ray.serve.queue import Item, Tensors
from maas_ray.serve.residency import Loaded, Residency
from maas_ray.serve.stats import Outcome, merge_pool, outcome_of, triton_statistics
from maas_ray.serve.wire import v2
from maas_ray.serve.wire.compression import MIN_BYTES, deflate, inflate

log = logging.getLogger(__name__)

JSON: Header = (b"content-type", b"application/json")
BINARY: Header = (b"content-type", b"application/octet-stream")

METRICS_EVERY_S = 1.0
"""Counts are gathered from the pool's replicas at most this often."""
OBSERVER_TIMEOUT_S = 3.0
"""Longest wait, at the end, for lines and spans to be written."""


class Reply(NamedTuple):
    """What goes back: status, headers (lower case) and body."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


class Peers(Protocol):
    """Asks all replicas of the pool, this one among them."""

    async def ask(self, question: str, argument: str = "") -> list[Any]:
        """The answers of `Handler.ask_here` in each replica, as plain JSON values."""
        ...


class Handler:
    """All answers of one replica.

    Args:
        residency: the models.
        max_body_bytes: largest body, also after its inflation.
        peers: the other replicas of the pool; None: there are none.
        observers: who is told of each request that has ended.
    """

    def __init__(
        self,
        residency: Residency,
        max_body_bytes: int = 16 << 20,
        *,
        peers: Peers | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.residency = residency
        self.max_body_bytes = max_body_bytes
        self.observers = tuple(observers)
        self._peers = peers
        self._meter = Meter()
        self._gathering: asyncio.Task[list[Any]] | None = None
        self._gathered_until = 0.0
        self.num_ongoing = 0
        """Inference requests that have been read and not answered; what autoscaling looks at."""

    def infer(
        self, head: Head, request_id: bytes, body: bytes | memoryview, deadline: float, done: Callable[[Reply], None]
    ) -> "HttpCall":
        """Answers one inference request.

        Args:
            head: taken through the layers; its route is `infer`.
            request_id: what the reply will carry.
            body: as received, not compressed.
            deadline: time of the loop's clock after which nobody waits.
            done: called once with the reply, possibly before this returns; not after `cancel`.

        Returns:
            The call, for `cancel`.
        """
        call = HttpCall(self, head, request_id, body, deadline, done)
        call.start()
        return call

    async def loaded(self, name: str, version: int | None, deadline: float) -> Loaded:
        """The version that answers, once it is in memory.

        Raises:
            NotFound: the pool has no such model or version.
            MaasError: it does not load, or not in time.
        """
        found = self.residency.find(name, version)
        if found is not None:
            return found
        future: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()

        def ready(loaded: Loaded | None, error: MaasError | None) -> None:
            if future.done():
                return
            if loaded is not None:
                future.set_result(loaded)
            else:
                future.set_exception(error or MaasError(f"model {name!r} did not load"))

        waiting = self.residency.load_soon(name, version, deadline, ready)
        try:
            return await future
        finally:
            waiting.cancel()

    async def answer(self, head: Head, body: bytes, deadline: float) -> Reply:
        """The reply to every route but `infer`.

        Raises:
            NotFound: no such model or version in this pool.
            MaasError: refused, with its status.
        """
        route, residency = head.route, self.residency
        match route.name:
            case "live":
                return _json({"live": True})
            case "ready":
                is_ready = residency.is_ready
                return _json({"ready": is_ready}, status=200 if is_ready else 503)
            case "server":
                return _json(v2.server_metadata())
            case "models":
                return _json({"models": residency.names})
            case "metrics":
                return await self._metrics(b"application/openmetrics-text" in dict(head.headers).get(b"accept", b""))
            case "stats":
                return _json(await self._statistics(route))
            case "index":
                return _json(await self._index(body))
            case "load" | "unload":
                return await self._control(route, body)
            case "versions":
                residency.find(route.model)
                numbers = [str(number) for number in residency.versions(route.model)]
                return _json({"name": route.model, "versions": numbers})
        return await self._about_model(route, deadline)

    def load(self) -> dict[str, float]:
        """What the pool is scaled by."""
        return self._meter.read(self.residency.stats.snapshot(), self.num_ongoing)

    async def close(self, drain_timeout_s: float) -> None:
        """Answers what waits, for at most `drain_timeout_s`; then gives everything back."""
        await self.residency.close(drain_timeout_s)
        for observer in self.observers:
            await asyncio.to_thread(observer.close, OBSERVER_TIMEOUT_S)

    async def ask(self, question: str, argument: str = "") -> list[Any]:
        """What every replica of the pool answers to `ask_here`."""
        if self._peers is None:
            return [await self.ask_here(question, argument)]
        return await self._peers.ask(question, argument)

    async def ask_here(self, question: str, argument: str = "") -> Any:
        """What this replica knows, as plain JSON values: `stats`, `index`, or `refresh`, which also looks anew."""
        match question:
            case "stats":
                return self.residency.stats.snapshot()
            case "index":
                return self.residency.index(ready_only=argument == "ready")
            case "refresh":
                await self.residency.refresh()
                return self.residency.index(ready_only=False)
        raise BadRequest(f"no question {question[:40]!r}")

    def inflate(self, head: Head, body: bytes) -> bytes:
        """The body without its content encoding.

        Raises:
            BodyTooLarge: it is larger than the pool's limit once it is inflated.
            BadRequest: it is not what its encoding says.
        """
        if head.content_encoding == b"identity":
            return body
        return inflate(body, head.content_encoding, self.max_body_bytes)

    def model_headers(self, route: Route) -> tuple[Header, ...]:
        """`x-maas-run` and `x-maas-version` of the version that a route addresses; empty if it is not in memory."""
        try:
            found = self.residency.find(route.model, route.version) if route.model else None
        except MaasError:
            return ()
        return found.headers if found is not None else ()

    async def _about_model(self, route: Route, deadline: float) -> Reply:
        residency = self.residency
        if route.name == "model_ready":
            found = residency.find(route.model, route.version)
            problems = residency.problems(route.model)
            # A model that is not in memory is loaded by its first request; it is ready unless that is known to fail.
            is_ready = found is not None or not problems
            reported = {"problems": problems} if problems else {}
            headers = found.headers if found is not None else ()
            return _json({"name": route.model, "ready": is_ready, **reported}, headers, 200 if is_ready else 503)
        loaded = await self.loaded(route.model, route.version, deadline)
        if route.name == "config":
            versions = residency.versions(route.model)
            batching = residency.spec.batching
            config = v2.model_config(
                route.model,
                versions,
                loaded.info,
                max_batch_size=batching.max_batch_size,
                max_delay_us=round(batching.max_delay_ms * 1000),
            )
            return _json(config, loaded.headers)
        parameters: dict[str, Any] = {"run": loaded.version.run, "version": str(loaded.version.version)}
        if problems := residency.problems(route.model):
            parameters["problems"] = problems
        versions = residency.versions(route.model) if route.version is None else [route.version]
        return _json(v2.model_metadata(route.model, versions, loaded.info, parameters), loaded.headers)

    async def _metrics(self, openmetrics: bool) -> Reply:
        # One gathering for all who ask at once: otherwise any caller could keep every replica busy with it.
        loop = asyncio.get_running_loop()
        if self._gathering is None or (self._gathering.done() and loop.time() > self._gathered_until):
            self._gathering = loop.create_task(self.ask("stats"))
            self._gathered_until = loop.time() + METRICS_EVERY_S
        snapshots = await asyncio.shield(self._gathering)
        text = await asyncio.to_thread(exposition, snapshots, openmetrics=openmetrics)
        kind = OPENMETRICS_CONTENT_TYPE if openmetrics else CONTENT_TYPE
        return Reply(200, ((b"content-type", kind),), text)

    async def _statistics(self, route: Route) -> dict[str, Any]:
        if route.model:
            self.residency.find(route.model, route.version)
        pooled = merge_pool(await self.ask("stats"))
        wanted = [
            triton_statistics(snapshot)
            for (name, version), snapshot in sorted(pooled.items())
            if route.model in ("", name) and route.version in (None, version)
        ]
        return {"model_stats": wanted}

    async def _index(self, body: bytes) -> list[dict[str, Any]]:
        ready_only = bool(_object(body).get("ready", False))
        entries: dict[tuple[str, str], dict[str, Any]] = {}
        for replica in await self.ask("index", "ready" if ready_only else ""):
            for entry in replica:
                # One replica that cannot serve it is what an operator must see.
                known = entries.get((entry["name"], entry["version"]))
                if known is None or known["state"] == "READY":
                    entries[(entry["name"], entry["version"])] = entry
        return list(entries.values())

    async def _control(self, route: Route, body: bytes) -> Reply:
        parameters = _object(body).get("parameters") or {}
        if type(parameters) is not dict or set(parameters) - {"unload_dependents"}:
            raise BadRequest(
                "parameters of load and unload other than unload_dependents are not offered: models come from the "
                "registry; publish a bundle (maas-ray import) and load it by its name"
            )
        if route.name == "load":
            await self.residency.load(route.model)
        else:
            await self.residency.unload(route.model)
        await self.ask("refresh")
        return _json({})


class Call:
    """One inference request between its last byte and its reply, whatever protocol it came by.

    A subclass reads the request, writes the answer and sends; each of its methods is called at most once, on the loop.

    Args:
        handler: whose request it is.
        head: where it leads.
        request_id: what its reply will carry.
        num_bytes: as received.
        deadline: time of the loop's clock after which nobody waits.
    """

    __slots__ = (
        "_deadline", "_handler", "_head", "_id", "_is_open", "_item", "_loaded", "_num_bytes", "_read_s", "_request",
        "_started", "_waiting",
    )  # fmt: skip

    def __init__(self, handler: Handler, head: Head, request_id: bytes, num_bytes: int, deadline: float) -> None:
        self._handler = handler
        self._head = head
        self._id = request_id
        self._num_bytes = num_bytes
        self._deadline = deadline
        self._is_open = True
        self._loaded: Loaded | None = None
        self._request: v2.InferRequest | None = None
        self._item: Item | None = None
        self._waiting: Any = None
        self._started = perf_counter()
        self._read_s = 0.0

    def has_priority(self) -> bool:
        """Whether it may ask to be run before others; looked at before it is read."""
        raise NotImplementedError

    def read(self, loaded: Loaded) -> v2.InferRequest:
        """The request as tensors that fit the model's signature."""
        raise NotImplementedError

    def write(self, loaded: Loaded, request: v2.InferRequest, outputs: Tensors) -> int:
        """Makes the reply, keeps it for `send`, and returns its size in bytes."""
        raise NotImplementedError

    def send(self) -> None:
        """Sends what `write` has made."""
        raise NotImplementedError

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        """Sends an error, with the headers of the version it concerns."""
        raise NotImplementedError

    def start(self) -> None:
        """Finds the model, or waits for it to be loaded."""
        handler, route = self._handler, self._head.route
        handler.num_ongoing += 1
        residency = handler.residency
        try:
            found = residency.find(route.model, route.version)
            if found is None:
                self._waiting = residency.load_soon(
                    route.model, route.version, self._deadline, self._ready, num_bytes=self._num_bytes
                )
        except Exception as error:
            self._fail(error)
            return
        if found is not None:
            self._ready(found, None)

    def cancel(self) -> None:
        """Nobody waits any more: nothing is sent, and the place in the queue is free."""
        if not self._is_open:
            return
        if self._item is not None and self._loaded is not None:
            self._loaded.batcher.cancel(self._item)
        if self._waiting is not None:
            self._waiting.cancel()
        self._close("cancelled", 499, 0)

    def _ready(self, loaded: Loaded | None, error: MaasError | None) -> None:
        if not self._is_open:
            return
        if loaded is None:
            self._fail(error or MaasError("the model did not load"))
            return
        self._loaded = loaded
        try:
            if loaded.batcher.is_behind and not self.has_priority():
                loaded.batcher.admit(self._deadline)
            started = perf_counter()
            request = self._request = self.read(loaded)
            self._read_s = perf_counter() - started
            deadline = self._deadline
            if request.timeout_us is not None:
                deadline = min(deadline, asyncio.get_running_loop().time() + request.timeout_us / 1e6)
            self._item = loaded.batcher.submit(
                request.inputs, request.num_rows, self._num_bytes, deadline, self._finished, priority=request.priority
            )
        except Exception as refusal:
            self._fail(refusal)

    def _finished(self, outputs: Tensors | None, error: MaasError | None) -> None:
        loaded, request = self._loaded, self._request
        if not self._is_open or loaded is None or request is None:
            return
        if outputs is None:
            self._fail(error or MaasError("the run gave no outputs"))
            return
        started = perf_counter()
        try:
            num_bytes = self.write(loaded, request, outputs)
        except MaasError as refusal:
            self._fail(refusal)
            return
        except Exception as failure:  # the caller must hear of it now, not at the deadline
            log.error("an answer of %s cannot be written", loaded.name, exc_info=failure)
            self._fail(MaasError("the answer cannot be written as it was asked for; ask for other outputs"))
            return
        loaded.stats.converted(self._read_s, perf_counter() - started)
        self._close("ok", 200, num_bytes)
        self.send()

    def _fail(self, error: Exception) -> None:
        if not self._is_open:
            return
        if not isinstance(error, MaasError):
            log.error("request %s failed in an unexpected way", self._id.decode(), exc_info=error)
            error = internal_error(self._id)
        self._close(outcome_of(error), error.http_status, 0)
        self.refuse(error, self._loaded.headers if self._loaded is not None else ())

    def _close(self, outcome: Outcome, status: int, bytes_out: int) -> None:
        self._is_open = False
        handler, loaded, request = self._handler, self._loaded, self._request
        handler.num_ongoing -= 1
        total_s = perf_counter() - self._started
        num_rows = request.num_rows if request is not None else 0
        if loaded is not None:
            loaded.stats.finished(outcome, total_s, num_rows, time())
        else:
            handler.residency.stats.answered("infer", status)
        if not handler.observers:
            return
        item, version = self._item, loaded.version if loaded is not None else None
        ended = Ended(
            outcome=outcome,
            status=status,
            request_id=self._id.decode(),
            total_s=total_s,
            model=version.model if version is not None else "",
            version=version.version if version is not None else 0,
            run=version.run if version is not None else "",
            bytes_in=self._num_bytes,
            bytes_out=bytes_out,
            num_rows=num_rows,
            read_s=self._read_s,
            queue_s=item.queue_s if item is not None else 0.0,
            compute_s=item.run_s if item is not None else 0.0,
            traceparent=self._head.traceparent,
        )
        for observer in handler.observers:
            observer.note(ended)


class HttpCall(Call):
    """A request of the v2 protocol over HTTP.

    Args:
        body: as received, not compressed.
        done: called once with the reply, not after `cancel`.
    """

    __slots__ = ("_answer", "_body", "_done")

    def __init__(
        self, handler: Handler, head: Head, request_id: bytes, body: bytes | memoryview, deadline: float,
        done: Callable[[Reply], None],
    ) -> None:  # fmt: skip
        super().__init__(handler, head, request_id, len(body), deadline)
        self._body = body
        self._done = done
        self._answer: v2.Answer | None = None

    def has_priority(self) -> bool:
        length = self._head.header_length
        text = self._body if length is None else self._body[:length]
        return b'"priority"' in bytes(text)

    def read(self, loaded: Loaded) -> v2.InferRequest:
        request = loaded.codec.read(self._body, self._head.header_length)
        self._body = b""  # JSON has been read; binary tensors hold their own part of it
        return request

    def write(self, loaded: Loaded, request: v2.InferRequest, outputs: Tensors) -> int:
        answer = self._answer = loaded.codec.write(request, outputs)
        return len(answer.body)

    def send(self) -> None:
        answer, loaded = self._answer, self._loaded
        if answer is None or loaded is None:
            return
        if answer.header_length is None:
            headers = loaded.json_headers
        else:
            length = (b"inference-header-content-length", b"%d" % answer.header_length)
            headers = (BINARY, *loaded.headers, length)
        reply = Reply(200, headers, answer.body)
        if self._head.accept_encoding and len(answer.body) >= MIN_BYTES:
            _compress(reply, self._head.accept_encoding, self._done)
        else:
            self._done(reply)

    def refuse(self, error: MaasError, headers: tuple[Header, ...]) -> None:
        self._done(error_reply(error, headers))


def internal_error(request_id: bytes) -> MaasError:
    """A failure that only the log may describe."""
    return MaasError(f"internal error; the replica's log has the cause under request id {request_id.decode()}")


def error_reply(error: MaasError, headers: tuple[Header, ...] = ()) -> Reply:
    """The protocol's form of an error: its class gives the status, `Overloaded` also the Retry-After header."""
    extra: tuple[Header, ...] = ()
    if isinstance(error, Overloaded):
        extra = ((b"retry-after", str(max(1, round(error.retry_after_s + 0.5))).encode()),)
    elif isinstance(error, DeadlineExceeded):
        extra = ((b"retry-after", b"1"),)
    elif isinstance(error, BodyTooLarge):
        extra = ((b"connection", b"close"),)  # what is left of the body is not worth reading
    return Reply(error.http_status, (JSON, *headers, *extra), v2.write_error(str(error)))


def _compress(reply: Reply, accept_encoding: bytes, done: Callable[[Reply], None]) -> None:
    """In a thread: deflating half a megabyte would keep the loop from everybody else for 15 ms."""
    loop = asyncio.get_running_loop()

    def packed(future: "asyncio.Future[tuple[bytes, bytes | None]]") -> None:
        if future.cancelled() or future.exception() is not None:
            done(reply)
            return
        body, encoding = future.result()
        headers = reply.headers if encoding is None else (*reply.headers, (b"content-encoding", encoding))
        done(Reply(reply.status, headers, body))

    loop.run_in_executor(None, deflate, reply.body, accept_encoding).add_done_callback(packed)


def _object(body: bytes) -> Mapping[str, Any]:
    if not body.strip():
        return {}
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error.msg} at character {error.pos}") from None
    if type(document) is not dict:
        raise BadRequest("the body is not a JSON object")
    return document


def _json(value: Any, headers: Sequence[Header] = (), status: int = 200) -> Reply:
    return Reply(status, (JSON, *headers), orjson.dumps(value))
