"""Every error that leaves the library, in one tree.

    MaasError
    ├── SpecError              a spec (YAML, --set, arguments) is not valid
    ├── NotFound               a run, model, version, alias, checkpoint or data set that does not exist
    ├── Conflict               the name is taken, or another writer won
    ├── DataError              the user's data cannot be read, cleaned or split as the spec says
    ├── ModelError             a model class cannot be imported, built or fed
    ├── StoreError             the object store failed
    │   ├── StoreUnavailable   unreachable or timed out after bounded retries
    │   ├── StoreDenied        credentials are wrong or lack a permission
    │   ├── StoreUnsafe        the store ignores create-only puts: commits could be lost
    │   ├── SaveFailed         a checkpoint was given up on every rank; nothing of it is committed
    │   └── ObjectCorrupt      a committed object is missing, truncated or altered
    ├── TrainingFailed         a training run ended with an error
    │   ├── RanksMissing       some ranks did not come where the others waited, or fell silent
    │   └── Preempted          it was asked to end, and has committed what it had: resume it
    ├── ClusterError           the Ray cluster is missing, misconfigured or too small
    │   └── ResourcesMissing   the cluster can never hold what the spec asks for
    ├── GateError              a proof failed: what was exported is not what was trained
    ├── BundleError            a bundle's graph or description is not servable
    ├── EngineFailed           a run failed for a reason that does not lie in the request
    │   └── EngineDied         the process that ran the model died during a run
    ├── ModelTooLarge          a model does not fit into its pool's memory budget
    ├── ConfinedError          work in a child process with limits did not end well
    │   ├── ConfinedTimeout    it took more time than it may, and was ended
    │   ├── ConfinedOutOfMemory  it needed more memory than it may take
    │   └── ConfinedKilled     it died of a signal, or ended without an answer
    └── RequestError           a serving request is refused
        ├── BadRequest         malformed, or does not fit the model's signature
        ├── NotThroughFront    it reached a port behind the front by another way
        ├── MethodNotAllowed   the path exists, the method does not
        ├── NotOffered         an extension of the protocol that this server does not have
        ├── FilesRefused       a load that brings the model's files with it
        ├── BodyTooLarge       the body is over the pool's limit
        ├── AnswerTooLarge     the answer is over the pool's limit
        ├── RequestQuarantined  it ended the process that ran it twice; it is not run for a while
        ├── DeadlineExceeded   the answer could not be ready in time; it was not computed
        │   └── RunStopped     a run was ended before it was done
        └── Overloaded         the queue is full; nothing was queued

A class carries what its border needs: `code` (stable, for machines), `http_status`, `retryable`.
A message says what happened, the value, the limit and the way out; never a secret, never another
tenant's data. All arguments reach `Exception.__init__`, so that pickling between processes keeps them. What a message quotes of
files and URLs is made safe to show when the error is made, see `display.shown`: it ends up in terminals, logs and answers.
"""

from maas_ray.display import shown


class MaasError(Exception):
    """Base of all errors of this library."""

    code = "internal"
    http_status = 500
    retryable = False

    def __init__(self, *args: object) -> None:
        # Nearly always one plain message, and under overload thousands a second.
        first = args[0] if args else None
        safe = (shown(first), *args[1:]) if isinstance(first, str) else args
        super().__init__(*safe)


class SpecError(MaasError):
    """A spec is not valid; the message names the field and the nearest right name or value."""

    code, http_status = "spec_invalid", 400


class NotFound(MaasError):
    """A named thing does not exist; the message lists the names that do."""

    code, http_status = "not_found", 404


class Conflict(MaasError):
    """The name is taken, or another writer committed first."""

    code, http_status = "conflict", 409


class DataError(MaasError):
    """The user's data cannot be read, cleaned or split as the spec says."""

    code, http_status = "data_invalid", 400


class ModelError(MaasError):
    """A model class cannot be imported, built with its parameters, or fed with the data."""

    code, http_status = "model_invalid", 400


class StoreError(MaasError):
    """The object store failed in a way that no retry mends."""

    code = "store_failed"


class StoreUnavailable(StoreError):
    """The object store did not answer within the bounded retries."""

    code, http_status, retryable = "store_unavailable", 503, True


class StoreDenied(StoreError):
    """The object store refused our credentials, or the path is not writable."""

    code, http_status = "store_denied", 403


class StoreUnsafe(StoreError):
    """The object store accepts a second create-only put of the same key; commits could be lost."""

    code = "store_unsafe"


class SaveFailed(StoreError):
    """A checkpoint was given up on every rank, because of one; the message names the rank and the object."""

    code, http_status, retryable = "save_failed", 503, True


class ObjectCorrupt(StoreError):
    """A committed object is missing, truncated or altered; it was not used."""

    code = "object_corrupt"


class TrainingFailed(MaasError):
    """A training run ended with an error; the message names the rank and the cause."""

    code = "training_failed"


class RanksMissing(TrainingFailed):
    """Ranks did not come where the others waited for them, or fell silent; the message names them."""

    code, retryable = "ranks_missing", True


class Preempted(TrainingFailed):
    """A run was asked to end, and has committed what it had; resume it."""

    code, http_status, retryable = "preempted", 503, True


class ClusterError(MaasError):
    """The Ray cluster is missing, misconfigured or cannot be started."""

    code, http_status = "cluster_invalid", 503


class ResourcesMissing(ClusterError):
    """The cluster can never hold what the spec asks for."""

    code = "resources_missing"


class GateError(MaasError):
    """A proof failed: the exported model does not compute what the trained one does."""

    code, http_status = "gate_failed", 422


class BundleError(MaasError):
    """A bundle's graph, signature or description is not servable."""

    code, http_status = "bundle_invalid", 422


class EngineFailed(MaasError):
    """A run of the model failed for a reason that does not lie in the request."""

    code = "engine_failed"


class EngineDied(EngineFailed):
    """The process that ran the model died during the run; the replica lives on and has started another one."""

    code = "engine_died"


class ModelTooLarge(MaasError):
    """A model needs more memory than its pool's budget leaves for it; waiting does not help."""

    code, http_status = "model_too_large", 503


class ConfinedError(MaasError):
    """Work on something foreign, in a child process with limits, did not end well; nothing else was affected."""

    code, http_status = "confined_failed", 422


class ConfinedTimeout(ConfinedError):
    """The child took more wall time or CPU time than it may, and was ended."""

    code = "confined_timeout"


class ConfinedOutOfMemory(ConfinedError):
    """The child needed more memory than it may take."""

    code = "confined_out_of_memory"


class ConfinedKilled(ConfinedError):
    """The child died of a signal, or ended without an answer.

    Args:
        message: what it worked on, and what ended it.
        signal: its number; 0 where it was none.
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
    """The request is malformed, or does not fit the model's signature."""

    code = "bad_request"


class NotThroughFront(RequestError):
    """A request reached a port behind the front without having come through it."""

    code, http_status = "not_through_front", 403


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    code, http_status = "method_not_allowed", 405


class NotOffered(RequestError):
    """The request asks for an extension of the protocol that this server does not have."""

    code, http_status = "not_offered", 501


class FilesRefused(RequestError):
    """A request to load a model brings its files; models come from the registry alone."""

    code = "files_refused"


class BodyTooLarge(RequestError):
    """The body is larger than the pool accepts; it was not parsed."""

    code, http_status = "body_too_large", 413


class AnswerTooLarge(RequestError):
    """The answer would be larger than the pool sends; it was not written."""

    code, http_status = "answer_too_large", 422


class RequestQuarantined(RequestError):
    """The same values have twice ended the process that ran the model; they are not run again for a while."""

    code, http_status = "request_quarantined", 422


class DeadlineExceeded(RequestError):
    """The answer could not be ready before the request's deadline; expired work is not run."""

    code, http_status, retryable = "deadline_exceeded", 504, True


class RunStopped(DeadlineExceeded):
    """A run was ended before it was done, since nobody waited for it any more, or it kept others from their deadlines."""

    code = "run_stopped"


class Overloaded(RequestError):
    """The replica's queue is full; nothing was queued.

    Args:
        message: what is full, its fill and its limit.
        retry_after_s: seconds after which a retry is likely to be accepted (the Retry-After header).
    """

    code, http_status, retryable = "overloaded", 503, True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])
