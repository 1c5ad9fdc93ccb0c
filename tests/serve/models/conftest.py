"""Engines whose creation a test holds."""

import threading
from typing import Any, ClassVar

import pytest

from maas_ray.bundle import loading
from maas_ray.bundle.engine.engine import Engine


class SlowEngine(Engine):
    """An engine whose creation blocks until the test releases it."""

    gate: threading.Event
    begun: ClassVar[list[str]]
    at_once = 0
    most_at_once = 0

    def __init__(self, bundle: Any, spec: Any = None, **more: Any) -> None:
        cls = type(self)
        cls.begun.append(bundle.id)
        cls.at_once += 1
        cls.most_at_once = max(cls.most_at_once, cls.at_once)
        assert cls.gate.wait(20)
        super().__init__(bundle, spec, **more)
        cls.at_once -= 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowEngine]:
    """Loads stop until `gate` is set."""

    class Slow(SlowEngine):
        gate = threading.Event()
        begun: ClassVar[list[str]] = []

    monkeypatch.setattr(loading, "Engine", Slow)
    return Slow
