"""BentoML: its adaptive batching, one worker."""

from typing import Any

import bentoml
from raw_session import Model


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Bench:
    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def predict(self, requests: list[Any]) -> list[Any]:
        parts = [self.model.read(request) for request in requests]
        return [self.model.write(part) for part in self.model.run_all(parts)]
