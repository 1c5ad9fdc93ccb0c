"""Failures of the connection to an S3 service, at every request of saving, retention and garbage collection."""

from contextlib import suppress
from datetime import timedelta

import pytest

from maas_ray.errors import MaasError
from maas_ray.store import objects
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import StorageSpec, open_store
from tests.checkpoint.states import small_parts
from tests.checkpoint.test_crash import ALLOWED, FEW, _act, _checked_view, _fresh
from tests.support.wire import WIRE_FAULTS, faulty_wire


@pytest.fixture(autouse=True)
def few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many faults as retries would take half an hour."""
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    monkeypatch.setattr(objects, "RETRY", {"max_retries": 2, "retry_timeout": timedelta(seconds=5), "backoff": quick})


@pytest.mark.fault
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("storage", ["s3"], indirect=True)
@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", WIRE_FAULTS)
def test_the_newest_committed_checkpoint_loads_whatever_request_fails(
    storage: StorageSpec, fault: str, is_lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, FEW)
    assert storage.endpoint is not None
    _fresh(storage, "count")
    with faulty_wire(storage.endpoint, fault) as wire:
        _act(open_store(StorageSpec(uri=f"{storage.uri}-count", endpoint=wire.endpoint)))
        num_changes = wire.num_changes
    assert num_changes >= 8
    views = []
    for number in range(1, num_changes + 1):
        store = _fresh(storage, f"{number}")
        has_failed = True
        with faulty_wire(storage.endpoint, fault, number, is_lasting=is_lasting) as wire, suppress(MaasError):
            _act(open_store(StorageSpec(uri=store.uri, endpoint=wire.endpoint)))
            has_failed = False
        assert has_failed or not is_lasting, "the fault took place"
        views.append(_checked_view(store))
        assert views[-1] in ALLOWED
        if fault == "503" and not is_lasting:
            assert (has_failed, views[-1]) == (False, ALLOWED[-1]), "one refusal is retried"
        assert fsck(store, collect=True, grace=timedelta(0)).problems == []
        assert _checked_view(store) == views[-1]
        _act(store)
        assert _checked_view(store) == ALLOWED[-1]
        assert fsck(store).problems == []
    if is_lasting:
        assert len(set(views)) == len(ALLOWED)
