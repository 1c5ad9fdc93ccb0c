"""Routes of everything but inference: from a parsed head and a body to a JSON response. Independent of ASGI and sockets."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from maas_ray.errors import BadRequest
from maas_ray.serve.http import json_documents
from maas_ray.serve.http.scrape import scrape
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.head import Head, Header
from maas_ray.serve.request.response import JSON, Reply
from maas_ray.serve.spec.cors import preflight_headers


async def answer(handler: Handler, head: Head, body: bytes, deadline: float) -> Reply:
    """Returns the response of every route except inference.

    Args:
        handler: handler of the replica.
        head: head that has passed the layers.
        body: body as received, not compressed.
        deadline: time on the loop's clock after which the response is not wanted.

    Raises:
        NotFound: no such model or version in this pool.
        MaasError: the request is refused.
    """
    route, about, pool = head.route, handler.descriptions, handler.pool
    match route.name:
        case "live":
            return json_reply({"live": True})
        case "ready":
            is_ready = about.is_ready
            return json_reply({"ready": is_ready}, status=200 if is_ready else 503)
        case "server":
            return json_reply(json_documents.server_metadata(about.server()))
        case "preflight":
            return Reply(200, preflight_headers(dict(head.headers)), b"")
        case "nothing":
            return json_reply([] if route.method == "GET" else {})
        case "models":
            return json_reply({"models": about.models()})
        case "metrics":
            return await _metrics(handler, head)
        case "stats":
            models = await pool.statistics(route.model, route.version)
            return json_reply({"model_stats": [json_documents.model_statistics(model) for model in models]})
        case "index":
            entries = await pool.index(ready_only=bool(_object(body).get("ready", False)))
            return json_reply([entry._asdict() for entry in entries])
        case "load":
            await pool.load(route.model, _object(body).get("parameters"))
            return json_reply({})
        case "unload":
            await pool.unload(route.model, _object(body).get("parameters"))
            return json_reply({})
        case "versions":
            numbers = [str(number) for number in about.versions(route.model)]
            return json_reply({"name": route.model, "versions": numbers})
        case "model_ready":
            model = about.readiness(route.model, route.version)
            reported = {"problems": model.problems} if model.problems else {}
            document = {"name": model.name, "ready": model.is_ready, **reported}
            return json_reply(document, model.headers, 200 if model.is_ready else 503)
        case "config":
            config, headers = await about.config(route.model, route.version, deadline)
            return json_reply(json_documents.model_config(config), headers)
    metadata, headers = await about.metadata(route.model, route.version, deadline)
    return json_reply(json_documents.model_metadata(metadata), headers)


def json_reply(value: Any, headers: Sequence[Header] = (), status: int = 200) -> Reply:
    """Returns a response with a JSON document."""
    return Reply(status, (JSON, *headers), orjson.dumps(value))


async def _metrics(handler: Handler, head: Head) -> Reply:
    snapshots = await handler.pool.snapshots()
    return await asyncio.to_thread(
        scrape, head.headers, snapshots, pool=handler.manager.stats.pool, num_silent=snapshots.num_silent
    )


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
