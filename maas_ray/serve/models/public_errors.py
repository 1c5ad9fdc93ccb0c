"""What callers may read of errors of the store and the registry: those name other models, hosts, paths and keys.

At the border to both, an error becomes one for callers, of the same class; the original is its cause, which only the
replica's log and whoever starts a replica get to see. Knows no model.
"""

from maas_ray.errors import MaasError, NotFound, ObjectCorrupt, StoreError

_MARK = "is_for_callers"
_LOG = "the replica's log has the cause"


def for_callers(error: MaasError, what: str) -> MaasError:
    """What callers are shown instead of an error of the store or the registry; any other error is shown as it is.

    Args:
        error: what happened.
        what: what was wanted, in words that the caller knows ("version 3 of model 'digits'").
    """
    if hasattr(error, _MARK):
        return error
    if isinstance(error, NotFound):
        text = f"no {what}; {_LOG}"
    elif isinstance(error, ObjectCorrupt):
        text = f"{what} cannot be read from the store: its bytes have not the sha256 or the form that was committed; {_LOG}"
    elif isinstance(error, StoreError):
        text = f"{what} cannot be read from the store ({error.code}); {'try again later' if error.retryable else _LOG}"
    else:
        return error
    shown = type(error)(text)
    setattr(shown, _MARK, True)
    shown.__cause__ = error
    return shown


def original(error: BaseException) -> BaseException:
    """The error itself, of one that `for_callers` returned; any other one as it is."""
    cause = error.__cause__
    return cause if cause is not None and hasattr(error, _MARK) else error
