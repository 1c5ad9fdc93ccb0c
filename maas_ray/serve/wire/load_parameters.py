"""Parameters of a request to load or unload a model. Independent of models.

Source: triton-inference-server/server, docs/protocol/extension_model_repository.md. A load there may override the
model's configuration and contain its files; here models come from the registry, and only `max_batch_size` can be
overridden.
"""

from typing import Any, NamedTuple

import orjson

from maas_ray.errors import BadRequest, FilesRefused, NotOffered
from maas_ray.serve.wire.metadata import BACKEND, PLATFORM
from maas_ray.serve.wire.tensors import short

_MAX_BATCH_SIZE = 1 << 20
_FILE = "file:"
_HERE = {"platform": PLATFORM, "backend": BACKEND}
"""Entries that a configuration may contain because they are correct here."""


class LoadParameters(NamedTuple):
    """Options of a load request."""

    max_batch_size: int | None = None
    """Maximum rows of one run; None: as in the pool's spec."""


def read_load(model: str, parameters: Any) -> LoadParameters:
    """Parses the parameters of a load request.

    Raises:
        FilesRefused: it contains files.
        NotOffered: it overrides more than the batch size.
        BadRequest: it is malformed.
    """
    if parameters is None:
        return LoadParameters()
    if type(parameters) is not dict:
        raise BadRequest("parameters is not an object")
    if any(name.startswith(_FILE) for name in parameters):
        raise FilesRefused(
            f"failed to poll from model repository: the files of {model!r} cannot be sent with the request; publish "
            "them (maas-ray import) and load the model by its name"
        )
    if others := sorted(set(parameters) - {"config"}):
        raise NotOffered(f"parameter {short(others[0])} is not supported; the only parameter of a load is config")
    text = parameters.get("config")
    return LoadParameters() if text is None else _read_config(model, text)


def read_unload(parameters: Any) -> None:
    """Raises `BadRequest` for unsupported parameters of an unload request."""
    if parameters is not None and (type(parameters) is not dict or set(parameters) - {"unload_dependents"}):
        raise BadRequest("the only parameter of an unload is unload_dependents")


def _read_config(model: str, text: Any) -> LoadParameters:
    try:
        config = orjson.loads(text) if type(text) is str else None
    except orjson.JSONDecodeError:
        config = None
    if type(config) is not dict:
        raise BadRequest(f"config {short(text)} is not the text of a JSON object")
    for name, value in {**_HERE, "name": model}.items():
        if config.pop(name, value) not in (value, ""):
            raise NotOffered(f"config cannot change {name}, which is {value!r}")
    size = config.pop("max_batch_size", None)
    if config:
        raise NotOffered(
            f"config cannot override {short(next(iter(config)))}, only max_batch_size; other settings are in the "
            "pool's spec and in the registry"
        )
    if size is None:
        return LoadParameters()
    number = int(size) if type(size) is str and size.isascii() and size.isdigit() and len(size) < 10 else size
    if type(number) is not int or not 0 < number <= _MAX_BATCH_SIZE:
        raise BadRequest(f"config max_batch_size {short(size)} is not an integer from 1 to {_MAX_BATCH_SIZE}")
    return LoadParameters(number)
