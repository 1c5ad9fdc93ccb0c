"""Stock Ray Serve: @serve.batch, onnxruntime, plain JSON."""

import os
import time

import ray
from raw_session import Model
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Bench:
    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def predict(self, parts):
        return self.model.run_all(parts)

    async def __call__(self, request: Request):
        if request.method == "GET":
            return {}
        return self.model.write(await self.predict(self.model.read(await request.json())))


if __name__ == "__main__":
    # BENCH_* must reach the replica, whose environment is this process's.
    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning", _temp_dir=os.environ["BENCH_TEMP"])
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])},
        logging_config={"enable_access_log": False},
    )
    serve.run(Bench.options(logging_config={"enable_access_log": False}).bind(), name="bench", route_prefix="/")
    while True:
        time.sleep(60)
