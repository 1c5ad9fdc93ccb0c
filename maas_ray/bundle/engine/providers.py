"""Selects onnxruntime's execution providers for a session, and their options.

The GPU providers are not tested, because the tests run on CPUs; their options are from onnxruntime's documentation
(https://onnxruntime.ai/docs/execution-providers/).
"""

from collections.abc import Collection

from maas_ray.bundle.format import Signature
from maas_ray.display import get_logger

log = get_logger(__name__)

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

Provider = tuple[str, dict[str, str]]


def choose_providers(
    gpus: float, available: Collection[str], signature: Signature, max_rows: int, use_cuda_graph: bool = False
) -> list[Provider]:
    """Providers in order of preference; logs the reason.

    Args:
        gpus: GPUs of the replica.
        available: providers of this build of onnxruntime.
        signature: signature of the graph; TensorRT builds one engine for all numbers of rows if nothing else varies.
        max_rows: maximum rows of a run.
        use_cuda_graph: whether runs are captured; only CUDA's provider supports it, so TensorRT is then omitted.
    """
    if gpus <= 0:
        log.info("execution provider: CPU, because the replica has no GPU")
        return [(CPU, {})]
    chosen: list[Provider] = []
    if TENSORRT in available and not use_cuda_graph and not _varies(signature):
        chosen.append((TENSORRT, _tensorrt(signature, max_rows)))
    if CUDA in available:
        # The arena grows by the requested size, not to the next power of two, because several models share the GPU.
        # Benchmarking every convolution for every new shape would block requests for seconds.
        options = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
        chosen.append((CUDA, {**options, "enable_cuda_graph": "1"} if use_cuda_graph else options))
    chosen.append((CPU, {}))
    left_out = "" if chosen[0][0] == TENSORRT else "; TensorRT is omitted, because " + (
        "this build does not have it" if TENSORRT not in available
        else "runs are captured as CUDA graphs" if use_cuda_graph
        else "sizes other than the number of rows vary, for each of which it would build an engine"
    )  # fmt: skip
    names = ", ".join(name for name, _ in chosen)
    log.info("execution providers in order of preference: %s (the replica has %g GPUs%s)", names, gpus, left_out)
    return chosen


def _varies(signature: Signature) -> bool:
    return any(-1 in (t.shape[1:] if signature.is_batched else t.shape) for t in signature.inputs)


def _tensorrt(signature: Signature, max_rows: int) -> dict[str, str]:
    if not signature.is_batched:
        return {}

    def shapes(num_rows: int) -> str:
        return ",".join(f"{t.name}:{'x'.join(map(str, (num_rows, *t.shape[1:])))}" for t in signature.inputs)

    most = shapes(max_rows)
    return {
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": most,
        "trt_profile_max_shapes": most,
    }
