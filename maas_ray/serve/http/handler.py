"""Request handler: answers parsed requests, from head and body to response. Independent of ASGI, sockets and Ray.

Inference is answered by callback, so that a protocol class needs no task per request; everything else is awaited.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson

from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError
from maas_ray.serve.controller.autoscaling import Meter
from maas_ray.serve.http.call import HttpCall
from maas_ray.serve.http.generate import GenerateCall
from maas_ray.serve.http.peers import Answers
from maas_ray.serve.http.scrape import scrape
from maas_ray.serve.models.manager import Loaded, ModelManager
from maas_ray.serve.request.head import Head, Header, Route
from maas_ray.serve.request.offload import Workers
from maas_ray.serve.request.response import JSON, Reply
from maas_ray.serve.spec.cors import preflight_headers
from maas_ray.serve.telemetry.request_record import Observer
from maas_ray.serve.telemetry.stats import merge_pool, triton_statistics
from maas_ray.serve.wire import v2
from maas_ray.serve.wire.compression import inflate
from maas_ray.serve.wire.load_parameters import read_load, read_unload

METRICS_EVERY_S = 1.0
"""Minimum seconds between two collections of statistics from the pool's replicas."""
OBSERVER_TIMEOUT_S = 3.0
"""Maximum wait, at the end, until log lines and spans are written."""


class Peers(Protocol):
    """Calls all replicas of the pool, including this one."""

    async def ask(self, question: str, argument: str = "") -> Answers:
        """Returns the results of `Handler.ask_here` of each replica, as plain JSON values."""
        ...


class Handler:
    """Request handler of one replica.

    Args:
        manager: models.
        max_body_bytes: maximum body size, also after decompression.
        peers: the other replicas of the pool; None: there are none.
        observers: receive a record of each completed request.
    """

    def __init__(
        self,
        manager: ModelManager,
        max_body_bytes: int = 16 << 20,
        *,
        peers: Peers | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.manager = manager
        self.max_body_bytes = max_body_bytes
        self.observers = tuple(observers)
        self._peers = peers
        self._meter = Meter()
        self._gathering: asyncio.Task[Answers] | None = None
        self._gathered_until = 0.0
        self.workers = Workers(manager.budget)
        """Parse large bodies and write large responses."""
        self.num_ongoing = 0
        """Inference requests that were read and not answered; used for autoscaling."""

    def infer(
        self, head: Head, request_id: bytes, body: bytes | memoryview, deadline: float, done: Callable[[Reply], None]
    ) -> HttpCall:
        """Answers one inference request.

        Args:
            head: head that has passed the layers; its route is one of `INFERENCE`.
            request_id: request id for the response.
            body: body as received, not compressed.
            deadline: time on the loop's clock after which the response is not wanted.
            done: called once with the response, possibly before this returns; not after `cancel`.

        Returns:
            The call, for `cancel`.
        """
        kind = HttpCall if head.route.name == "infer" else GenerateCall
        call = kind(self, head, request_id, body, len(body), deadline, done)
        call.start()
        return call

    async def loaded(self, name: str, version: int | None, deadline: float) -> Loaded:
        """Returns the version for a request, once it is in memory.

        Raises:
            NotFound: the pool has no such model or version.
            MaasError: it could not be loaded, or not in time.
        """
        found = self.manager.find(name, version)
        if found is not None:
            return found
        future: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()

        def ready(loaded: Loaded | None, error: MaasError | None) -> None:
            if future.done():
                return
            if loaded is not None:
                future.set_result(loaded)
            else:
                future.set_exception(error or MaasError(f"model {name!r} was not loaded"))

        waiting = self.manager.load_soon(name, version, deadline, ready)
        try:
            return await future
        finally:
            waiting.cancel()

    async def answer(self, head: Head, body: bytes, deadline: float) -> Reply:
        """Returns the response of every route except `infer`.

        Raises:
            NotFound: no such model or version in this pool.
            MaasError: the request is refused.
        """
        route, manager = head.route, self.manager
        match route.name:
            case "live":
                return _json({"live": True})
            case "ready":
                is_ready = manager.is_ready
                return _json({"ready": is_ready}, status=200 if is_ready else 503)
            case "server":
                return _json(v2.server_metadata(manager.spec.server_name))
            case "preflight":
                return Reply(200, preflight_headers(dict(head.headers)), b"")
            case "nothing":
                return _json([] if route.method == "GET" else {})
            case "models":
                return _json({"models": manager.names})
            case "metrics":
                return await self._metrics(head)
            case "stats":
                return _json(await self._statistics(route))
            case "index":
                return _json(await self._index(body))
            case "load" | "unload":
                return await self._control(route, body)
            case "versions":
                manager.find(route.model)
                numbers = [str(number) for number in manager.versions(route.model)]
                return _json({"name": route.model, "versions": numbers})
        return await self._about_model(route, deadline)

    def load(self) -> dict[str, float]:
        """Returns the metrics for autoscaling."""
        return self._meter.read(self.manager.stats.snapshot(), self.num_ongoing)

    async def close(self, drain_timeout_s: float) -> None:
        """Answers waiting requests, for at most `drain_timeout_s`; then releases everything."""
        await self.manager.close(drain_timeout_s)
        self.workers.close()
        for observer in self.observers:
            await asyncio.to_thread(observer.close, OBSERVER_TIMEOUT_S)

    async def ask(self, question: str, argument: str = "") -> Answers:
        """Returns the results of `ask_here` of every replica of the pool."""
        if self._peers is None:
            return Answers([await self.ask_here(question, argument)])
        return await self._peers.ask(question, argument)

    async def ask_here(self, question: str, argument: str = "") -> Any:
        """Returns this replica's `stats` or `index`, as plain JSON values, or the index after a `refresh`."""
        match question:
            case "stats":
                return self.manager.stats.snapshot()
            case "index":
                return self.manager.index(ready_only=argument == "ready")
            case "refresh":
                await self.manager.refresh()
                return self.manager.index(ready_only=False)
        raise BadRequest(f"unknown call {question[:40]!r}")

    def inflate(self, head: Head, body: bytes) -> bytes:
        """Returns the body without its content encoding.

        Raises:
            BodyTooLarge: the decompressed body exceeds the pool's limit.
            BadRequest: the body does not match its encoding.
        """
        if head.content_encoding == b"identity":
            return body
        return inflate(body, head.content_encoding, self.max_body_bytes)

    def model_headers(self, route: Route) -> tuple[Header, ...]:
        """Returns `x-maas-run` and `x-maas-version` of the version in a route; empty if it is not in memory."""
        try:
            found = self.manager.find(route.model, route.version) if route.model else None
        except MaasError:
            return ()
        return found.headers if found is not None else ()

    async def _about_model(self, route: Route, deadline: float) -> Reply:
        manager = self.manager
        if route.name == "model_ready":
            found = manager.find(route.model, route.version)
            problems = manager.problems(route.model)
            # A model that is not in memory is loaded by its first request; it is ready unless its load is known to
            # fail.
            is_ready = found is not None or not problems
            reported = {"problems": problems} if problems else {}
            headers = found.headers if found is not None else ()
            return _json({"name": route.model, "ready": is_ready, **reported}, headers, 200 if is_ready else 503)
        loaded = await self.loaded(route.model, route.version, deadline)
        if route.name == "config":
            versions = manager.versions(route.model)
            batching = manager.spec.batching
            config = v2.model_config(
                route.model,
                versions,
                loaded.info,
                max_batch_size=loaded.batcher.max_batch_size,
                max_delay_us=round(batching.max_delay_ms * 1000),
            )
            return _json(config, loaded.headers)
        parameters: dict[str, Any] = {"run": loaded.version.run, "version": str(loaded.version.version)}
        if problems := manager.problems(route.model):
            parameters["problems"] = problems
        versions = manager.versions(route.model) if route.version is None else [route.version]
        return _json(v2.model_metadata(route.model, versions, loaded.info, parameters), loaded.headers)

    async def _metrics(self, head: Head) -> Reply:
        # One collection for all concurrent scrapes: otherwise any client could keep every replica busy.
        loop = asyncio.get_running_loop()
        if self._gathering is None or (self._gathering.done() and loop.time() > self._gathered_until):
            self._gathering = loop.create_task(self.ask("stats"))
            self._gathered_until = loop.time() + METRICS_EVERY_S
        snapshots = await asyncio.shield(self._gathering)
        return await asyncio.to_thread(
            scrape, head.headers, snapshots, pool=self.manager.stats.pool, num_silent=snapshots.num_silent
        )

    async def _statistics(self, route: Route) -> dict[str, Any]:
        if route.model:
            self.manager.find(route.model, route.version)
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
                # A replica that cannot serve it takes precedence, so that operators see it.
                known = entries.get((entry["name"], entry["version"]))
                if known is None or known["state"] == "READY":
                    entries[(entry["name"], entry["version"])] = entry
        return list(entries.values())

    async def _control(self, route: Route, body: bytes) -> Reply:
        parameters = _object(body).get("parameters")
        if route.name == "load":
            try:
                wanted = read_load(route.model, parameters)
                await self.manager.load(route.model, max_batch_size=wanted.max_batch_size)
            except MaasError as error:  # the text begins like Triton's: its clients look for the words
                error.args = (f"failed to load {route.model!r}, {error}", *error.args[1:])
                raise
        else:
            read_unload(parameters)
            await self.manager.unload(route.model)
        if num_silent := (await self.ask("refresh")).num_silent:
            raise DeadlineExceeded(f"{num_silent} replicas of the pool did not confirm the request in time; retry")
        return _json({})


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
