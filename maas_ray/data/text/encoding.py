"""Tokenizes texts in Ray tasks; the results are in the order of the texts. Independent of data sets.

The tokenizers library itself uses all CPUs of one machine; tasks use those of all machines, and do not slow down the
process that reads and writes.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np
import ray
from numpy.typing import DTypeLike, NDArray

from maas_ray.decoding.tokenizer import Tokenizer
from maas_ray.errors import ClusterError

TASK_TIMEOUT_S = 1800.0
TEXTS_AT_ONCE = 64
"""Texts per task: about 4 MB, so that the cost of starting a task is negligible."""
_WAITING = 2
"""Tasks per CPU that are running or waiting to be fetched; bounds the memory."""


def encode_in_tasks(
    texts: Iterable[str], tokenizer: Tokenizer, datatype: DTypeLike, timeout_s: float = TASK_TIMEOUT_S
) -> Iterator[NDArray[np.generic]]:
    """The token ids of each text, without special tokens.

    Args:
        texts: texts, consumed as tasks become free.
        tokenizer: tokenizer, sent to each process once as a file.
        datatype: datatype of the token ids.
        timeout_s: longest wait for one task.

    Raises:
        ClusterError: a task did not end in time, or was lost too often.
    """
    encode = ray.remote(_encode).options(num_cpus=1)
    content = ray.put(tokenizer.content)
    window = _WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[ray.ObjectRef] = deque()
    left = iter(texts)
    try:
        while True:
            while len(waiting) < window and (batch := list(islice(left, TEXTS_AT_ONCE))):
                waiting.append(encode.remote(content, batch, np.dtype(datatype).str))
            if not waiting:
                return
            token_ids, lengths = _fetch(waiting[0], timeout_s)
            waiting.popleft()
            yield from np.split(token_ids, np.cumsum(lengths)[:-1])
    finally:
        for task in waiting:
            ray.cancel(task)


def _fetch(task: ray.ObjectRef, timeout_s: float) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    try:
        found: tuple[NDArray[np.generic], NDArray[np.int64]] = ray.get(task, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(
            f"no CPU of the Ray cluster encoded a batch of texts within {timeout_s:g} s; free CPUs of the cluster, or "
            "add a node"
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the texts could not be encoded: {error}") from error
    return found


def _encode(content: bytes, texts: Sequence[str], datatype: str) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """The concatenated token ids of all texts, and the number of token ids of each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    token_ids = [one.astype(datatype) for one in _tokenizer(content).encode(texts)]
    return np.concatenate(token_ids), np.array([len(one) for one in token_ids], dtype=np.int64)


@lru_cache(maxsize=1)
def _tokenizer(content: bytes) -> Tokenizer:
    return Tokenizer(content)
