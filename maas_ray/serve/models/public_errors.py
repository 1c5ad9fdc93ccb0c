"""Error texts for clients: store and registry errors are replaced, since they name other models, hosts, paths and keys.

An error of the store or the registry is converted to one for clients, of the same class; the original is its cause,
which is visible only in the replica's log and to the operator who starts a replica.
"""

from maas_ray.errors import MaasError, NotFound, ObjectCorrupt, StoreError

_MARK = "is_for_callers"
_LOG = "the replica's log has the cause"


def for_callers(error: MaasError, what: str) -> MaasError:
    """Returns the error for clients in place of an error of the store or the registry; other errors are unchanged.

    Args:
        error: original error.
        what: requested object, in terms that the client knows ("version 3 of model 'digits'").
    """
    if hasattr(error, _MARK):
        return error
    if isinstance(error, NotFound):
        text = f"no {what}; {_LOG}"
    elif isinstance(error, ObjectCorrupt):
        text = f"{what} cannot be read from the store: its sha256 or format differs from the committed one; {_LOG}"
    elif isinstance(error, StoreError):
        text = f"{what} cannot be read from the store ({error.code}); {'retry later' if error.retryable else _LOG}"
    else:
        return error
    shown = type(error)(text)
    setattr(shown, _MARK, True)
    shown.__cause__ = error
    return shown


def original(error: BaseException) -> BaseException:
    """Returns the original of an error that `for_callers` returned; any other error unchanged."""
    cause = error.__cause__
    return cause if cause is not None and hasattr(error, _MARK) else error
