"""Puts the sketch into the cluster beside our pool, or takes it away. Arguments: state directory, "up" or "down".

Its protocol class sits where ours does: in a replica of Ray Serve with one CPU, behind the same HAProxy.
"""

import os
import sys
from pathlib import Path

from maas_ray.cluster import connect, disconnect

NAME, PREFIX = "sketch", "/sketch"


class Sketch:
    def __init__(self) -> None:
        import uvicorn.config
        from sketch_app import Protocol

        uvicorn.config.HTTP_PROTOCOLS["auto"] = Protocol  # before Serve starts this process's server

    async def __call__(self, request):
        return {}


if __name__ == "__main__":
    home, what = sys.argv[1:]
    connect(state_dir=home)
    from ray import serve  # reads the cluster's environment when it is imported

    if what == "down":
        serve.delete(NAME)
    else:
        variables = {name: value for name, value in os.environ.items() if name.startswith("BENCH_")}
        variables["PYTHONPATH"] = str(Path(__file__).parent)
        options = {"num_cpus": 1, "runtime_env": {"env_vars": variables}}
        deployment = serve.deployment(Sketch, max_ongoing_requests=1000, ray_actor_options=options)
        serve.run(deployment.bind(), name=NAME, route_prefix=PREFIX)
    disconnect()
