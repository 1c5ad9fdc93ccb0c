"""Rollout spec: how the pools of a spec are updated. Independent of Ray."""

from pydantic import PositiveFloat

from maas_ray.spec import Spec


class RolloutSpec(Spec):
    """How replicas of a new version replace old ones.

    If there are free resources for both versions, the new replicas start first and no capacity is lost. If not,
    replicas are replaced one at a time, and `maas-ray serve` reports it.
    """

    timeout_s: PositiveFloat = 180.0
    """Maximum time of an update without an additional ready replica of the new version. After it the update is rolled
    back: the pool gets its previous description, and a new pool is removed. It must exceed the time in which a replica
    starts and loads its models, and `limits.drain_timeout_s`, for which a stopping replica may keep its resources."""
    allow_downtime: bool = False
    """Whether a pool may be unavailable during an update that is otherwise impossible: one replica that does not fit
    twice, or new replicas so much larger that several old ones must end for each. If false, such an update is
    refused."""
    preempt_training: bool = False
    """Whether an update or a new pool without enough free resources preempts training runs: they commit a checkpoint,
    end their workers, and continue automatically once there are free resources."""
