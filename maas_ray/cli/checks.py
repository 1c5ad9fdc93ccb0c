"""The content checks of `maas-ray fsck`: the reader of each kind of commit and log. Independent of any store."""

import re

from maas_ray.store.fsck import Checks


def all_checks() -> Checks:
    """The checks for everything that this version writes; imported late, since only `fsck` needs all of them."""
    from maas_ray.bundle import format as bundles
    from maas_ray.checkpoint import catalog
    from maas_ray.registry import models as registry
    from maas_ray.serve.deploy import record
    from maas_ray.serve.models import desired_state
    from maas_ray.store import lease
    from maas_ray.train.records import events as run_events
    from maas_ray.train.records import run_index, runs
    from maas_ray.train.search import log as searches

    return Checks(
        commits={
            bundles.KIND: bundles.check_bundle,
            catalog.KIND: catalog.check_checkpoint,
            runs.KIND: runs.check_run,
        },
        records=(
            (re.compile(registry.PREFIX), registry.read_event),
            (record.RECORDS, record.read_event),
            (re.compile(rf"{desired_state.PREFIX}/[^/]+/wanted"), desired_state.read_desired),
            (catalog.PINS, catalog.read_pin),
            (re.compile(r".+/owners"), lease.read_owner),
            (re.compile(rf"{searches.PREFIX}/[^/]+"), searches.read_event),
            (re.compile(rf"{runs.PREFIX}/[^/]+"), run_events.read_event),
            (re.compile(run_index.PREFIX), run_index.read_index_event),
        ),
    )
