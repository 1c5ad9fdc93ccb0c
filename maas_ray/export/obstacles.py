"""Explains why a module has no ONNX graph: the reason, the line of its code, and the usual fix. Runs nothing."""

import linecache
import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

import torch

_LIBRARIES = tuple(
    f"{Path(path).resolve()}/"
    for path in (
        Path(torch.__file__).parent,
        Path(torch.__file__).parents[1] / "onnxscript",
        Path(torch.__file__).parents[1] / "onnx_ir",
        Path(__file__).parents[1] / "export",
        Path(__file__).parents[1] / "data",
    )
)
"""Folders whose frames are no part of the model."""
_STDLIB = f"{Path(sysconfig.get_path('stdlib')).resolve()}/"
_SITE = f"{Path(torch.__file__).resolve().parents[1]}/"
_TRACER = str(Path(__file__).with_name("onnx_export.py"))
"""The file that traces; frames outside of it are no part of the model."""
_GUARDS = "torch.fx.experimental.symbolic_shapes"
"""Torch's logger of the assumptions about sizes that a trace makes."""
_MAX_ERRORS = 10
_MAX_TEXT = 200

_VALUES = (
    "it depends on values of the rows, but a graph has the same operations for all rows; compute both results and select "
    "with torch.where, or branch with torch.cond; keep numbers as tensors instead of .item() or int(); run every expert on "
    "all rows and weight the results, or on the selected rows without a test whether there are any"
)
_ROWS = (
    "it needs a fixed number of rows, but a graph takes any number; use -1 or x.shape[0] instead of a number, and no loop "
    "or condition over the rows"
)
_PACKED = (
    "packed sequences have no graph; run the recurrent layer on the padded rows, and leave the padding out afterwards with "
    "a mask (torch.where, or a masked mean)"
)
_NUMPY = "NumPy cannot be traced; use the function of torch instead"
_OPERATION = "this operation has no ONNX equivalent; use other operations of torch"
_ANY = "torch.export must be able to trace every operation of forward for any number of rows"


@dataclass
class GuardLines:
    """The lines of the model at which a trace assumed something about the number of rows, in their order."""

    found: list[str] = field(default_factory=list)


def explain(error: Exception, name: str, guards: GuardLines) -> str:
    """The message for an error of torch.export or torch.onnx.export.

    Args:
        error: the error.
        name: class of the module.
        guards: of the same trace; see `watch_guards`.
    """
    chain = list(_chain(error))
    fix = _fix(chain)
    line = next((line for one in chain if (line := failing_line(one)) is not None), None)
    if fix is _ROWS and line is None:
        line = next(iter(guards.found), None)
    root = chain[-1]
    place = "" if line is None else f" at {line}"
    return f"{name} cannot be exported to ONNX{place}: {fix} ({type(root).__name__}: {_first_paragraph(root)})"


def failing_line(error: BaseException) -> str | None:
    """The innermost line of the model in an error's traceback, as `file:number "source"`; None if there is none."""
    lines = []
    for frame, number in _frames(error.__traceback__):
        if _is_model(frame.f_code.co_filename):
            lines.append(_shown(frame.f_code.co_filename, number))
        # While a graph is translated, the model's frames are gone, but each node has their text.
        trace = getattr(frame.f_locals.get("node"), "stack_trace", None)
        if isinstance(trace, str):
            lines += [line for line in [_line_of_text(trace)] if line is not None]
    return lines[-1] if lines else None


@contextmanager
def watch_guards() -> Iterator[GuardLines]:
    """Collects the lines at which a trace assumes something about sizes; torch reports them only in its log."""
    lines, logger = GuardLines(), logging.getLogger(_GUARDS)
    kept = (logger.handlers, logger.level, logger.propagate)
    logger.handlers, logger.propagate = [_GuardHandler(lines)], False
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.handlers, logger.propagate = kept[0], kept[2]
        logger.setLevel(kept[1])


class _GuardHandler(logging.Handler):
    """Notes the model's line that is running when a guard is added."""

    def __init__(self, lines: GuardLines) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if "[guard added]" not in str(record.msg):
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename != _TRACER:
            if _is_model(frame.f_code.co_filename):
                self._lines.found.append(_shown(frame.f_code.co_filename, frame.f_lineno))
                return
            frame = frame.f_back


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, outermost first."""
    current: BaseException | None = error
    for _ in range(_MAX_ERRORS):
        if current is None:
            return
        yield current
        current = current.__cause__


def _fix(chain: list[BaseException]) -> str:
    texts = [f"{type(one).__name__}: {one}" for one in chain]
    files = {frame.f_code.co_filename for one in chain for frame, _ in _frames(one.__traceback__)}
    if any(name.endswith(("nn/modules/rnn.py", "nn/utils/rnn.py")) for name in files):
        return _PACKED
    if any("umpy" in text for text in texts):
        return _NUMPY
    if any("data-dependent" in text or "DataDependent" in text or "DynamicControlFlow" in text for text in texts):
        return _VALUES
    if any("Constraints violated" in text or "ConstraintViolation" in text for text in texts):
        return _ROWS
    if any("No ONNX function found" in text or "UnsupportedOperator" in text for text in texts):
        return _OPERATION
    return _ANY


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _is_model(filename: str) -> bool:
    """Whether a file can belong to the model: it is no part of torch, of the export or of Python."""
    if filename.startswith("<"):
        return False
    path = str(Path(filename).resolve())
    return not path.startswith(_LIBRARIES) and (path.startswith(_SITE) or not path.startswith(_STDLIB))


def _line_of_text(trace: str) -> str | None:
    """The innermost line of the model in a formatted traceback."""
    found = None
    for entry in trace.splitlines():
        if not entry.strip().startswith('File "'):
            continue
        name, _, rest = entry.strip().removeprefix('File "').partition('", line ')
        number = rest.partition(",")[0]
        if number.isdigit() and _is_model(name):
            found = _shown(name, int(number))
    return found


def _shown(filename: str, number: int) -> str:
    source = linecache.getline(filename, number).strip()
    return f'{Path(filename).name}:{number} "{source}"' if source else f"{Path(filename).name}:{number}"


def _first_paragraph(error: BaseException) -> str:
    """Torch's message before its advice on debugging, on one line."""
    text = " ".join(str(error).strip().partition("\n\n")[0].split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def describe_failure(error: Exception) -> str:
    """An error of the model's own code with its line."""
    line = failing_line(error)
    place = "" if line is None else f" at {line}"
    text = traceback.format_exception_only(error)[-1].strip()
    return f"{text}{place}"
