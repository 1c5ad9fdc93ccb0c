"""The servers that we are compared with: packages, and how each is started in its best simple configuration."""

import json
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.processes import Launch, free_port
from maas_ray.cluster.node.environment import Profile, choose_ports, environment

APPS = Path(__file__).parent / "apps"
MODEL_NAME = "bench"
MAX_BATCH = 64
_INFER, _READY = f"/v2/models/{MODEL_NAME}/infer", f"/v2/models/{MODEL_NAME}/ready"


@dataclass(frozen=True)
class Job:
    """What a peer is to serve."""

    python: Path
    """Of the peer's environment."""
    model: Path
    """The ONNX file."""
    input_shape: tuple[int, ...]
    """Of one row."""
    input_kind: str
    """Datatype of the Open Inference Protocol."""
    output_width: int
    directory: Path
    """Empty, the peer's own."""

    @property
    def env(self) -> dict[str, str]:
        """What the programs in apps/ read."""
        return {"BENCH_MODEL": str(self.model), "PYTHONPATH": str(APPS), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Peer:
    """One server, or one configuration of it."""

    name: str
    about: str
    environment: str
    """Name of its environment; empty: the one this program runs in."""
    packages: tuple[str, ...]
    launch: Callable[[Job], Launch]
    is_replica: Callable[[str], bool] = lambda command: True
    """Which of its processes, by command line, holds the model."""
    has_binary: bool = False
    """Whether it takes binary tensors."""
    can_pause: bool = True
    """False: it does not always come back from a stop; it should need no CPU while nobody asks."""
    around: tuple[bytes, bytes] = (b"", b"")
    """What it wants before and after the body that everybody else gets."""


def _triton(job: Job) -> Launch:
    """The server of the nvidia-pytriton wheel with its python backend, which wants the stub of this Python beside itself."""
    site = (
        job.python.parent.parent / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    )
    server = site / "pytriton" / "tritonserver"
    model = job.directory / MODEL_NAME
    (model / "1").mkdir(parents=True)
    shutil.copy(APPS / "triton_model.py", model / "1" / "model.py")
    stub = (
        server
        / "python_backend_stubs"
        / f"{sys.version_info.major}.{sys.version_info.minor}"
        / "triton_python_backend_stub"
    )
    if not (server / "backends" / "python" / stub.name).exists():
        shutil.copy(stub, server / "backends" / "python")
    (model / "config.pbtxt").write_text(
        f'name: "{MODEL_NAME}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH}\n'
        f'input [{{ name: "x" data_type: TYPE_{job.input_kind} dims: {list(job.input_shape)} }}]\n'
        f'output [{{ name: "y" data_type: TYPE_FP32 dims: [{job.output_width}] }}]\n'
        "dynamic_batching { max_queue_delay_microseconds: 0 }\n"
        "instance_group [{ kind: KIND_CPU count: 1 }]\n"
        f'parameters {{ key: "onnx" value {{ string_value: "{job.model}" }} }}\n'
    )
    port = free_port()
    argv = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={job.directory}",
        f"--backend-directory={server / 'backends'}",
    ]
    argv += ["--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    argv += ["--log-info=false", "--disable-auto-complete-config"]
    libraries = [str(site / "nvidia_pytriton.libs")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        libraries.append(
            sysconfig.get_config_var("LIBDIR")
        )  # the stub embeds the interpreter that installed the packages
    # The embedded interpreter finds the environment through the first python3 of the path.
    env = {"LD_LIBRARY_PATH": ":".join(libraries), "PATH": f"{job.python.parent}:{os.environ['PATH']}"}
    return Launch(argv, port, _INFER, _READY, env)


def _mlserver(job: Job, max_batch: int) -> Launch:
    port = free_port()
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port() + 1000, "metrics_endpoint": None}
    settings |= {"parallel_workers": 0, "debug": False, "access_logger": None, "use_structured_logging": False}
    model: dict[str, object] = {"name": MODEL_NAME, "implementation": "mlserver_app.Runtime"}
    if max_batch:
        model |= {"max_batch_size": max_batch, "max_batch_time": 0.001}
    (job.directory / "settings.json").write_text(json.dumps(settings))
    (job.directory / "model-settings.json").write_text(json.dumps(model))
    argv = [str(job.python.parent / "mlserver"), "start", str(job.directory)]
    return Launch(argv, port, _INFER, _READY, job.env, job.directory)


def _litserve(job: Job) -> Launch:
    port = free_port()
    argv = [str(job.python), str(APPS / "litserve_app.py")]
    return Launch(argv, port, "/predict", "/health", {**job.env, "BENCH_PORT": str(port)}, job.directory)


def _bentoml(job: Job) -> Launch:
    port = free_port()
    argv = [str(job.python), "-m", "bentoml", "serve", "bentoml_app:Bench", "--host", "127.0.0.1", "--port", str(port)]
    env = {**job.env, "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(job.directory)}
    return Launch([*argv, "--working-dir", str(APPS)], port, "/predict", "/readyz", env, APPS)


def _uvicorn(job: Job) -> Launch:
    port = free_port()
    argv = [str(job.python), "-m", "uvicorn", "uvicorn_app:app", "--host", "127.0.0.1", "--port", str(port)]
    argv += [
        "--loop",
        "uvloop",
        "--http",
        "httptools",
        "--no-access-log",
        "--log-level",
        "warning",
        "--lifespan",
        "off",
    ]
    return Launch(argv, port, "/", "/", job.env, APPS)


def _sketch(job: Job) -> Launch:
    port = free_port()
    argv = [str(job.python), str(APPS / "sketch_app.py")]
    return Launch(argv, port, _INFER, _READY, {**job.env, "BENCH_PORT": str(port)}, APPS)


def _ray(job: Job, profile: Profile) -> Launch:
    """Serve as Ray's documentation starts it; with HAProxy, its throughput flags too. Paths and ports are ours alone."""
    ports = choose_ports(http=0, dashboard=0)
    flags = environment(profile, ports=ports, temp_dir=job.directory, token_path=job.directory / "token")
    kept = {
        name: value
        for name, value in flags.items()
        if "HAPROXY" in name or "FALLBACK" in name or "DIRECT_INGRESS" in name
    }
    kept |= {name: flags[name] for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")}
    kept |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "BENCH_TEMP": str(job.directory)}
    (job.directory / "h").mkdir()
    argv = [str(job.python), str(APPS / "ray_app.py")]
    return Launch(argv, ports.http, "/", "/", {**job.env, **kept, "BENCH_PORT": str(ports.http)}, APPS, 180.0)


_ONNXRUNTIME, _NUMPY = "onnxruntime==1.31.1", "numpy==2.4.6"
_UVICORN = ("uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0", "orjson==3.13.0", _ONNXRUNTIME, _NUMPY)
_RAY = ("ray[serve]==2.60.0", _ONNXRUNTIME, _NUMPY)
_MLSERVER = ("mlserver==1.7.1", _ONNXRUNTIME, _NUMPY)


def _is_serve_replica(command: str) -> bool:
    return "ServeReplica" in command


PEERS = {
    peer.name: peer
    for peer in (
        Peer("triton", "Triton's python backend running onnxruntime, delay 0, one instance", "triton",
             ("nvidia-pytriton==0.7.0", _ONNXRUNTIME, "numpy==1.26.4"), _triton,
             lambda command: "python_backend_stub" in command, has_binary=True, can_pause=False),
        Peer("mlserver", "MLServer, batching within 1 ms", "mlserver", _MLSERVER, lambda job: _mlserver(job, MAX_BATCH)),
        Peer("mlserver-plain", "MLServer, no batching", "mlserver", _MLSERVER, lambda job: _mlserver(job, 0)),
        Peer("litserve", "LitServe, batching within 1 ms, one worker", "litserve",
             ("litserve==0.2.19", _ONNXRUNTIME, _NUMPY), _litserve),
        Peer("bentoml", "BentoML, adaptive batching, one worker", "bentoml",
             ("bentoml==1.4.39", _ONNXRUNTIME, _NUMPY), _bentoml, around=(b'{"requests":[', b"]}")),
        Peer("ray", "Ray Serve, its Python proxy, @serve.batch", "ray", _RAY,
             lambda job: _ray(job, "portable"), _is_serve_replica),
        Peer("ray-haproxy", "Ray Serve, HAProxy and throughput flags, @serve.batch", "ray", _RAY,
             lambda job: _ray(job, "fast"), _is_serve_replica),
        Peer("uvicorn", "one uvicorn process, raw ASGI, no batching, nothing before it", "uvicorn", _UVICORN, _uvicorn),
        Peer("sketch", "a bare protocol class in one uvicorn process: batches, pays no other duty", "uvicorn",
             (*_UVICORN, "pysimdjson==7.0.2"), _sketch),
    )
}  # fmt: skip


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
