"""Functions that tests run in confined children."""

import ctypes
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from maas_ray.errors import DataError, MaasError, Overloaded

Answer = tuple[dict[str, Any], list[bytes]]


def echo(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    return payload, [bytes(blob) for blob in blobs]


def look(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    """What a child can see of its surroundings."""
    return {
        "pid": os.getpid(),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "environment": dict(os.environ),
        "path": sys.path,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
    }, []


def fail(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    kinds: dict[str, MaasError | Exception] = {
        "data": DataError("row 3 has no value"),
        "overloaded": Overloaded("full", 2.5),
        "foreign": KeyError("something private"),
    }
    raise kinds[payload["kind"]]


def spin(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    while True:
        pass


def sleep(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    time.sleep(payload["seconds"])
    return {}, []


def die(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    os.kill(os.getpid(), getattr(signal, payload["signal"]))
    return {}, []


def crash(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    ctypes.string_at(8)
    return {}, []


def eat(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    return {"taken": len(bytearray(payload["bytes"]))}, []


def write(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    with open(payload["path"], "wb") as file:
        file.write(bytes(payload["bytes"]))
    return {}, []


def answer(payload: dict[str, Any], blobs: list[bytearray]) -> Answer:
    return {}, [bytes(payload["bytes"])]


def count(sock: socket.socket, descriptors: list[int]) -> None:
    """A service: answers each byte with the next one."""
    while data := sock.recv(1):
        sock.send(bytes([data[0] + 1]))
