"""Options of onnxruntime's sessions for all runs of graphs. Independent of bundles."""

import onnxruntime as ort


def session_options(num_threads: int) -> ort.SessionOptions:
    """Options of a session that runs one operator at a time and does not log: exceptions report all errors.

    Args:
        num_threads: threads per operator; 0: one per core.
    """
    options = ort.SessionOptions()
    # Explicit: onnxruntime ignores OMP_NUM_THREADS and would use every core of the machine for each session.
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 4  # the caller receives the error of a rejected row; it must not fill the log
    return options


def cpu_session(graph: bytes, num_threads: int) -> ort.InferenceSession:
    """A session on the CPU; see `session_options`. Raises onnxruntime's exceptions, which have no common base class."""
    return ort.InferenceSession(graph, session_options(num_threads), providers=["CPUExecutionProvider"])
