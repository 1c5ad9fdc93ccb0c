"""Throughput of a run: tokens per second and model FLOPs utilization. Independent of the loop."""

import re
from dataclasses import replace

import torch

from maas_ray.data.spec.features import Features
from maas_ray.display import get_logger
from maas_ray.models.build import build_model
from maas_ray.row import Row
from maas_ray.train.loop.progress import Progress
from maas_ray.train.spec.train import TrainSpec

PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
}
"""Peak of a GPU by the first matching part of its name: 1e12 operations per second of dense matrix products in bfloat16
and in float32 (without TF32), from NVIDIA's data sheets."""
_PROBE_ROWS = 2
logger = get_logger(__name__)


class Rates:
    """Adds rates to progress reports, derived from the samples per second.

    Args:
        spec: the run.
        features: features of its data.
        device: device of each rank.
        world: number of ranks.
    """

    def __init__(self, spec: TrainSpec, features: Features, device: torch.device, world: int) -> None:
        self._spec, self._features, self._world = spec, features, world
        self._peak = peak_tflops(spec, device)
        self._flops: float | None = None

    def added_to(self, progress: Progress) -> Progress:
        """Returns the report with `tokens_per_s` if rows are tokens, and `mfu` if the device's peak is known.

        MFU as in Chowdhery et al. 2022 (PaLM), appendix B: operations of the model's forward and backward pass, without
        recomputed activations.
        """
        rate, row = progress.samples_per_s, self._features.row
        if rate is None:
            return progress
        mfu = None
        if self._peak is not None:
            if self._flops is None:  # at the first report, so that counting does not delay the first step
                self._flops = count_flops(self._spec, self._features) or 0.0
            if self._flops:
                mfu = rate * self._flops / (self._peak * 1e12 * self._world)
        return replace(progress, tokens_per_s=rate * row.shape[0] if row.is_tokens else None, mfu=mfu)


def peak_tflops(spec: TrainSpec, device: torch.device) -> float | None:
    """Peak performance of a worker's device in 1e12 operations per second; None: unknown."""
    if spec.performance.peak_tflops is not None:
        return spec.performance.peak_tflops
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (bf16, fp32) in PEAKS.items():
        if re.search(rf"\b{part}\b", name):  # an A10G is not an A10
            return bf16 if spec.precision == "bf16" else fp32
    return None


def count_flops(spec: TrainSpec, features: Features) -> float | None:
    """Floating-point operations of the forward and backward pass of one row; None if the model cannot be traced.

    torch counts matrix products, convolutions and attention, on tensors without data.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            net = build_model(spec.model, features.row, features.num_outputs, per_token=features.is_per_token)
            with FlopCounterMode(display=False) as counter:
                net(_probe(features.row)).sum().backward()
    except Exception as error:  # a user's model can raise anything on tensors without data
        logger.warning("MFU is not logged: the model's operations cannot be counted (%s)", error)
        return None
    return float(counter.get_total_flops()) / _PROBE_ROWS


def _probe(row: Row) -> torch.Tensor:
    shape = (_PROBE_ROWS, *row.shape)
    return torch.zeros(shape, dtype=torch.int64) if row.is_tokens else torch.zeros(shape)
