"""Every error of the public API, in one tree.

    MaasError
    ├── SpecError              a spec (YAML, --set, arguments) is invalid
    ├── NotFound               a run, model, version, alias, checkpoint or data set does not exist
    ├── Conflict               the name is in use, or another writer committed first
    ├── DataError              the data cannot be read, cleaned or split as specified
    ├── ModelError             a model class cannot be imported, built or called
    ├── StoreError             the object store failed
    │   ├── StoreUnavailable   unreachable, or timed out after a limited number of retries
    │   ├── StoreDenied        the credentials are wrong or lack a permission
    │   ├── StoreUnsafe        the store ignores create-only puts: commits could be lost
    │   ├── SaveFailed         a checkpoint was aborted on every rank; nothing was committed
    │   └── ObjectCorrupt      a committed object is missing, truncated or altered
    ├── TrainingFailed         a training run failed
    │   ├── RanksMissing       some ranks did not reach a barrier, or their heartbeat stopped
    │   └── Preempted          the run was asked to end and committed a checkpoint: resume it
    ├── ClusterError           the Ray cluster is missing, misconfigured or too small
    │   └── ResourcesMissing   the cluster can never provide the resources of the spec
    ├── GateError              the exported model differs from the trained model
    ├── BundleError            a bundle's graph or description is not servable
    ├── EngineFailed           an inference failed for a reason other than the request
    │   └── EngineDied         the process that ran the model died during an inference
    ├── ModelTooLarge          a model does not fit into its pool's memory budget
    ├── ConfinedError          work in a child process with limits failed
    │   ├── ConfinedTimeout    the child exceeded its time limit and was ended
    │   ├── ConfinedOutOfMemory  the child exceeded its memory limit
    │   └── ConfinedKilled     the child was killed by a signal, or ended without a result
    └── RequestError           a serving request is refused
        ├── BadRequest         malformed, or does not match the model's signature
        ├── NotThroughFront    reached a port behind the front without the front
        ├── MethodNotAllowed   the path exists, the method does not
        ├── NotOffered         a protocol extension that this server does not support
        ├── FilesRefused       a load request that contains the model's files
        ├── BodyTooLarge       the body exceeds the pool's limit
        ├── AnswerTooLarge     the response exceeds the pool's limit
        ├── RequestQuarantined  killed its process twice; not run again for a while
        ├── DeadlineExceeded   no response was possible before the deadline; not computed
        │   └── RunStopped     an inference was stopped before its end
        └── Overloaded         the queue is full; nothing was queued

Each class has `code` (stable, for programs), `http_status` and `retryable`. A message contains the fact, the value, the
limit and the fix, but no secret and no data of another tenant. All arguments reach `Exception.__init__`, so that
pickling between processes keeps them. Quoted text of files and URLs is escaped when the error is created (see
`display.shown`), because messages reach terminals, logs and responses.
"""

from maas_ray.display import shown


class MaasError(Exception):
    """Base of all errors of this library."""

    code = "internal"
    http_status = 500
    retryable = False

    def __init__(self, *args: object) -> None:
        # Almost always one plain message; under overload, thousands per second.
        first = args[0] if args else None
        safe = (shown(first), *args[1:]) if isinstance(first, str) else args
        super().__init__(*safe)


class SpecError(MaasError):
    """A spec is invalid; the message contains the field and the nearest valid name or value."""

    code, http_status = "spec_invalid", 400


class NotFound(MaasError):
    """The named object does not exist; the message lists existing names."""

    code, http_status = "not_found", 404


class Conflict(MaasError):
    """The name is in use, or another writer committed first."""

    code, http_status = "conflict", 409


class DataError(MaasError):
    """The data cannot be read, cleaned or split as the spec requires."""

    code, http_status = "data_invalid", 400


class ModelError(MaasError):
    """A model class cannot be imported, built with its parameters, or called with the data."""

    code, http_status = "model_invalid", 400


class StoreError(MaasError):
    """The object store failed, and a retry does not help."""

    code = "store_failed"


class StoreUnavailable(StoreError):
    """The object store did not answer within the limited number of retries."""

    code, http_status, retryable = "store_unavailable", 503, True


class StoreDenied(StoreError):
    """The object store rejected the credentials, or the path is not writable."""

    code, http_status = "store_denied", 403


class StoreUnsafe(StoreError):
    """The object store accepts a second create-only put of the same key; commits could be lost."""

    code = "store_unsafe"


class SaveFailed(StoreError):
    """A checkpoint was aborted on every rank because one failed; the message contains the rank and the object."""

    code, http_status, retryable = "save_failed", 503, True


class ObjectCorrupt(StoreError):
    """A committed object is missing, truncated or altered; it was not used."""

    code = "object_corrupt"


class TrainingFailed(MaasError):
    """A training run failed; the message contains the rank and the cause."""

    code = "training_failed"


class RanksMissing(TrainingFailed):
    """Ranks did not reach a barrier, or their heartbeat stopped; the message lists them."""

    code, retryable = "ranks_missing", True


class Preempted(TrainingFailed):
    """A run was asked to end and committed a checkpoint; resume it."""

    code, http_status, retryable = "preempted", 503, True


class ClusterError(MaasError):
    """The Ray cluster is missing, misconfigured or cannot be started."""

    code, http_status = "cluster_invalid", 503


class ResourcesMissing(ClusterError):
    """The cluster can never provide the resources that the spec requires."""

    code = "resources_missing"


class GateError(MaasError):
    """The parity gate failed: the exported model does not compute the same as the trained model."""

    code, http_status = "gate_failed", 422


class BundleError(MaasError):
    """A bundle's graph, signature or description is not servable."""

    code, http_status = "bundle_invalid", 422


class EngineFailed(MaasError):
    """An inference failed for a reason other than the request."""

    code = "engine_failed"


class EngineDied(EngineFailed):
    """The process that ran the model died during an inference; the replica continues with a new process."""

    code = "engine_died"


class ModelTooLarge(MaasError):
    """A model needs more memory than its pool's budget has left; waiting does not help."""

    code, http_status = "model_too_large", 503


class ConfinedError(MaasError):
    """Work on untrusted input, in a child process with limits, failed; nothing else was affected."""

    code, http_status = "confined_failed", 422


class ConfinedTimeout(ConfinedError):
    """The child process exceeded its limit of wall time or CPU time and was ended."""

    code = "confined_timeout"


class ConfinedOutOfMemory(ConfinedError):
    """The child process exceeded its memory limit."""

    code = "confined_out_of_memory"


class ConfinedKilled(ConfinedError):
    """The child process was killed by a signal, or ended without a result.

    Args:
        message: the work and the cause.
        signal: number of the signal; 0 without one.
    """

    code = "confined_killed"

    def __init__(self, message: str, signal: int = 0) -> None:
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return str(self.args[0])


class RequestError(MaasError):
    """A serving request was refused; no other request was affected."""

    code, http_status = "request_refused", 400


class BadRequest(RequestError):
    """The request is malformed, or does not match the model's signature."""

    code = "bad_request"


class NotThroughFront(RequestError):
    """A request reached a port behind the front without passing through the front."""

    code, http_status = "not_through_front", 403


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    code, http_status = "method_not_allowed", 405


class NotOffered(RequestError):
    """The request uses a protocol extension that this server does not support."""

    code, http_status = "not_offered", 501


class FilesRefused(RequestError):
    """A load request contains the model's files; models come only from the registry."""

    code = "files_refused"


class BodyTooLarge(RequestError):
    """The body is larger than the pool accepts; it was not parsed."""

    code, http_status = "body_too_large", 413


class AnswerTooLarge(RequestError):
    """The response would exceed the pool's limit; it was not sent."""

    code, http_status = "answer_too_large", 422


class RequestQuarantined(RequestError):
    """The same values have killed the model's process twice; they are not run again for a while."""

    code, http_status = "request_quarantined", 422


class DeadlineExceeded(RequestError):
    """No response was possible before the request's deadline; expired work is not run."""

    code, http_status, retryable = "deadline_exceeded", 504, True


class RunStopped(DeadlineExceeded):
    """An inference was stopped: no client waited for it, or it would have made others miss their deadlines."""

    code = "run_stopped"


class Overloaded(RequestError):
    """The replica's queue is full; nothing was queued.

    Args:
        message: the queue, its length and its limit.
        retry_after_s: seconds after which a retry is likely to be accepted (the Retry-After header).
    """

    code, http_status, retryable = "overloaded", 503, True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])
