"""Answers requests that have been read: a path and a body in, a reply out. Knows no ASGI, no socket and no Ray.

    GET  v2 · v2/health/live · v2/health/ready · v2/models · v2/models/M[/versions/V] · …/ready · v2/models/M/versions
    POST v2/models/M[/versions/V]/infer

A reply to `infer` comes by callback, so that a protocol class can call this without a task per request.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, MethodNotAllowed, NotFound, Overloaded
from maas_ray.serve.queue import Item, Tensors
from maas_ray.serve.residency import Loaded, Residency
from maas_ray.serve.wire import v2

log = logging.getLogger(__name__)

Header = tuple[bytes, bytes]
JSON: Header = (b"content-type", b"application/json")


class Reply(NamedTuple):
    """What goes back: status, headers (lower case) and body."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


class Route(NamedTuple):
    """Where a path leads."""

    name: str
    """`live`, `ready`, `server`, `models`, `model`, `model_ready`, `versions` or `infer`."""
    method: str
    """The method it takes; HEAD is taken where GET is."""
    model: str = ""
    version: int | None = None


class Ticket(NamedTuple):
    """A request in the queue; `cancel` takes it out, and its callback is not called any more."""

    loaded: Loaded
    item: Item

    def cancel(self) -> None:
        """Frees the slot of a caller who has gone."""
        self.loaded.batcher.cancel(self.item)


def find_route(path: str) -> Route:
    """Where a path below the pool's base path leads.

    Raises:
        NotFound: nowhere.
        BadRequest: the version is not a positive integer.
    """
    segments = path.strip("/").split("/")
    match segments:
        case ["v2"]:
            return Route("server", "GET")
        case ["v2", "health", "live" | "ready" as what]:
            return Route(what, "GET")
        case ["v2", "models"]:
            return Route("models", "GET")
        case ["v2", "models", model, *rest] if model:
            return _model_route(path, model, rest)
    raise NotFound(f"no path {_short(path)}; the protocol starts at v2, its models at v2/models")


def _model_route(path: str, model: str, rest: list[str]) -> Route:
    version: int | None = None
    if len(rest) >= 2 and rest[0] == "versions":
        version = _version(rest[1])
        rest = rest[2:]
    match rest:
        case []:
            return Route("model", "GET", model, version)
        case ["versions"]:
            return Route("versions", "GET", model)
        case ["ready"]:
            return Route("model_ready", "GET", model, version)
        case ["infer"]:
            return Route("infer", "POST", model, version)
    raise NotFound(f"no path {_short(path)}; below a model there are versions, ready and infer")


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise BadRequest(f"version {_short(text)} is not a positive integer; GET v2/models/M lists the versions")
    return int(text)


class Handler:
    """All answers of one replica.

    Args:
        residency: the models.
    """

    def __init__(self, residency: Residency) -> None:
        self.residency = residency

    def infer(self, route: Route, body: bytes, deadline: float, done: Callable[[Reply], None]) -> Ticket:
        """Checks and queues one inference request.

        Args:
            route: where its path leads.
            body: as received.
            deadline: time of the loop's clock after which nobody waits.
            done: called once with the reply, unless the ticket is cancelled.

        Raises:
            RequestError: refused; `add_headers` gives the headers that belong to the model.
            NotFound: no such model or version in this pool.
        """
        loaded = self.residency.get(route.model, route.version)
        request = v2.read_infer(body, loaded.info.signature)

        def finished(outputs: Tensors | None, error: MaasError | None) -> None:
            if outputs is None:
                done(error_reply(error or MaasError("the run gave no outputs"), loaded.headers))
                return
            version = loaded.version
            try:
                answer = v2.write_infer(version.model, version.version, request, outputs, loaded.info.signature)
            except Exception:  # the caller must hear of it now, not at the deadline
                log.exception("an answer of model %r version %d cannot be written", version.model, version.version)
                done(
                    error_reply(
                        MaasError("the answer cannot be written as JSON; ask for other outputs"), loaded.headers
                    )
                )
                return
            done(Reply(200, (JSON, *loaded.headers), answer))

        num_bytes = max(len(body), sum(array.nbytes for array in request.inputs.values()))
        item = loaded.batcher.submit(request.inputs, request.num_rows, num_bytes, deadline, finished)
        return Ticket(loaded, item)

    def model_headers(self, route: Route) -> tuple[Header, ...]:
        """`x-maas-run` and `x-maas-version` of the version that a route addresses; empty if there is none."""
        try:
            return self.residency.get(route.model, route.version).headers if route.model else ()
        except NotFound:
            return ()

    def answer(self, route: Route) -> Reply:
        """The reply to every route but `infer`.

        Raises:
            NotFound: no such model or version in this pool.
        """
        residency = self.residency
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
        loaded = residency.get(route.model, route.version)
        if route.name == "versions":
            return _json({"name": route.model, "versions": [str(number) for number in residency.versions(route.model)]})
        problems = residency.problems(route.model)
        if route.name == "model_ready":
            reported = {"problems": problems} if problems else {}
            return _json({"name": route.model, "ready": True, **reported}, loaded.headers)
        parameters: dict[str, Any] = {"run": loaded.version.run, "version": str(loaded.version.version)}
        if problems:
            parameters["problems"] = problems
        versions = residency.versions(route.model) if route.version is None else [route.version]
        return _json(v2.model_metadata(route.model, versions, loaded.info, parameters), loaded.headers)


def check_method(route: Route, method: str) -> None:
    """Raises `MethodNotAllowed` unless a route takes a method."""
    if method != route.method and not (method == "HEAD" and route.method == "GET"):
        raise MethodNotAllowed(f"{_short(method)} is not allowed here; use {route.method}")


def error_reply(error: MaasError, headers: tuple[Header, ...] = ()) -> Reply:
    """The protocol's form of an error: its class gives the status, `Overloaded` also the Retry-After header."""
    extra: tuple[Header, ...] = ()
    if isinstance(error, Overloaded):
        extra = ((b"retry-after", str(max(1, round(error.retry_after_s + 0.5))).encode()),)
    elif isinstance(error, DeadlineExceeded):
        extra = ((b"retry-after", b"1"),)
    return Reply(error.http_status, (JSON, *headers, *extra), v2.write_error(str(error)))


def _json(value: Any, headers: tuple[Header, ...] = (), status: int = 200) -> Reply:
    return Reply(status, (JSON, *headers), orjson.dumps(value))


def _short(value: str) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
