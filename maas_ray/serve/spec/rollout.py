"""How the pools of a spec may be updated: what the spec says of it. Knows no Ray."""

from pydantic import PositiveFloat

from maas_ray.spec import Spec


class RolloutSpec(Spec):
    """How replicas of a new version take the place of old ones.

    Where both versions have room beside each other, the new replicas start first and no capacity is lost. Where they
    have not, replicas are replaced one at a time, and `maas-ray serve` says so.
    """

    timeout_s: PositiveFloat = 180.0
    """Longest time that an update may go without one more ready replica of the new version. Then it is taken back: the pool
    gets the description that it had before, and a new pool is removed. Longer than a replica takes to start and to load
    its models, and than `limits.drain_timeout_s`, for which a stopping replica may keep its room."""
    allow_downtime: bool = False
    """Whether a pool may be away during an update that has no other way: one replica that does not fit twice, or replicas
    so much larger than before that several must end for each new one. Otherwise such an update is refused."""
    preempt_training: bool = False
    """Whether training runs give way where an update or a new pool finds no room: they commit a checkpoint, end their
    workers, and continue by themselves once there is room again."""
