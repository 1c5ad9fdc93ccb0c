"""Applies `torch.compile` to each block: all blocks of a class share one compilation. Independent of layouts.

Only a block's `forward` is compiled. Hooks around it (FSDP2, tensor parallelism) do not change, nor do the names of its
weights, which torch.compile of a module would change. Activation checkpointing wraps the compiled function. Dropout is
not compiled, since each dropout layer has its own constants, which would each need a recompilation: a block with
dropout is compiled in the parts between. The compiler skips a whole loop with a graph break: `nn.Sequential` is split
here; a block with its own loop around dropout is not compiled. The same on GPUs, but untested there.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maas_ray.errors import ModelError, ResourcesMissing
from maas_ray.train.modules.blocks import Forward, blocks, replace_forward
from maas_ray.train.modules.dropout import SampleDropout


def compile_blocks(net: nn.Module) -> None:
    """Compiles the blocks of a whole model at their first use; called before the model is split.

    Raises:
        ModelError: the model has no blocks.
        ResourcesMissing: this machine has no C++ compiler or no Python header files.
    """
    refuse_no_compiler()
    found = blocks(net)
    if not found:
        raise ModelError(
            f"performance.compile: {type(net).__name__} has no blocks, which must be in a torch.nn.Sequential or a "
            "torch.nn.ModuleList; move its layers there, or remove compile"
        )
    for block in found:
        in_pieces = [module for module in block.modules() if _is_sequence(module) and _has_dropout(module)]
        for module in block.modules():
            if _is_dropout(module):
                replace_forward(module, _left_out)
        whole = [layer for sequence in in_pieces for layer in sequence.children() if _has_dropout(layer)] + [block]
        for module in in_pieces:
            replace_forward(module, _in_pieces)
        for module in whole:
            if not _is_dropout(module) and module not in in_pieces:
                replace_forward(module, _compiled)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, SampleDropout) and bool(module.p)


def _has_dropout(module: nn.Module) -> bool:
    return any(_is_dropout(inner) for inner in module.modules())


def _is_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _compiled(forward: Forward) -> Forward:
    inner: Any = torch.compile(forward)  # imports the compiler, which takes seconds

    def compiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    return compiled


def _in_pieces(forward: Forward) -> Forward:
    inner: Any = torch.compile(_run)

    def in_pieces(self: nn.Sequential, x: Any) -> Any:
        piece: list[nn.Module] = []
        for layer in self:
            if not _has_dropout(layer):
                piece.append(layer)
                continue
            if piece:
                x, piece = inner(piece, x), []
            x = layer(x)
        return inner(piece, x) if piece else x

    left_out: Forward = torch.compiler.disable(in_pieces, recursive=False)  # type: ignore[no-untyped-call]
    return left_out


def _run(layers: list[nn.Module], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _left_out(forward: Forward) -> Forward:
    left_out: Forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    return left_out


def refuse_no_compiler() -> None:
    """Refuses a machine without the requirements of torch.compile.

    Raises:
        ResourcesMissing: the message contains the missing requirement.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ResourcesMissing(
            f"performance.compile: this node has no C++ compiler {compiler!r}; install it (apt-get install g++), set "
            "the environment variable CXX to another one, or remove compile"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise ResourcesMissing(
            f"performance.compile: this node has no {header}; install Python's header files (apt-get install "
            "python3-dev), or remove compile"
        )
