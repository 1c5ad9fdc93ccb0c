"""Which of onnxruntime's execution providers a session is given, and their options. Makes no session.

The GPU providers have not been run by this project's tests, which run on CPUs; their options are those that
onnxruntime documents (https://onnxruntime.ai/docs/execution-providers/).
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
    """Providers in the order in which they are offered the graph, and the reason in the log.

    Args:
        gpus: what the replica owns.
        available: what this build of onnxruntime knows.
        signature: of the graph; TensorRT builds its engine once for all numbers of rows if nothing else varies.
        max_rows: most rows of a run.
        use_cuda_graph: whether runs are to be captured; CUDA's provider does it, TensorRT is then left out.
    """
    if gpus <= 0:
        log.info("execution provider: CPU, because the replica owns no GPU")
        return [(CPU, {})]
    chosen: list[Provider] = []
    if TENSORRT in available and not use_cuda_graph and not _varies(signature):
        chosen.append((TENSORRT, _tensorrt(signature, max_rows)))
    if CUDA in available:
        # The arena grows by what is asked for, not to the next power of two: several models share the GPU. Measuring
        # every convolution for every new shape would stop requests for seconds.
        options = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
        chosen.append((CUDA, {**options, "enable_cuda_graph": "1"} if use_cuda_graph else options))
    chosen.append((CPU, {}))
    left_out = "" if chosen[0][0] == TENSORRT else "; TensorRT is left out, because " + (
        "this build does not have it" if TENSORRT not in available
        else "runs are captured as CUDA graphs" if use_cuda_graph
        else "sizes other than the number of rows vary, for each of which it would build an engine"
    )  # fmt: skip
    names = ", ".join(name for name, _ in chosen)
    log.info("execution providers, first that works: %s (the replica owns %g GPUs%s)", names, gpus, left_out)
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
