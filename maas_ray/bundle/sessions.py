"""How onnxruntime's sessions are set up, wherever a graph is run. Knows no bundle and no error."""

import onnxruntime as ort


def session_options(num_threads: int) -> ort.SessionOptions:
    """Options of a session that runs one operator at a time and writes nothing to the log: an exception says what is wrong.

    Args:
        num_threads: of one operator; 0: as many as cores.
    """
    options = ort.SessionOptions()
    # Explicit: onnxruntime ignores OMP_NUM_THREADS and would take every core of the machine for each session.
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 4  # a refused row is the caller's news, not a line in our log per request
    return options


def cpu_session(graph: bytes, num_threads: int) -> ort.InferenceSession:
    """A session on the CPU; see `session_options`. Raises whatever onnxruntime does, with no base below `Exception`."""
    return ort.InferenceSession(graph, session_options(num_threads), providers=["CPUExecutionProvider"])
