"""Deterministic kernels, for all of a process. Independent of models and devices."""

import os

import torch


def use_deterministic_kernels(is_on: bool, *, warn_only: bool = False) -> None:
    """Makes torch use deterministic kernels, or stop using them.

    Args:
        is_on: whether an operation without a deterministic kernel on this device raises RuntimeError.
        warn_only: it warns instead.
    """
    if is_on:
        # cuBLAS is deterministic with a fixed workspace only, which it reads at its first use; torch refuses matrix
        # products otherwise. See torch.use_deterministic_algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_on, warn_only=warn_only)
