"""A replica of a pool inside Ray Serve: the same residency, handler and ASGI app as anywhere else. Never imports torch."""

from typing import Any

from ray import serve

from maas_ray.serve.handler import Handler
from maas_ray.serve.ingress import App
from maas_ray.serve.residency import Residency
from maas_ray.serve.spec import ApplicationSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store


class Replica:
    """The deployment class.

    Args:
        spec: an `ApplicationSpec` as plain values; validated again, in this process.

    Raises:
        MaasError: a model cannot be resolved or loaded; Serve shows the message as the reason of the failed start.
    """

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = parse_spec(ApplicationSpec, spec, source="application")
        self._residency = Residency(open_store(self._spec.storage), self._spec)
        await self._residency.start()

    def __serve_build_asgi_app__(self) -> App:
        # Its lifespan's end drains and closes the residency.
        return App(Handler(self._residency), self._spec.limits, sends_request_id=False)

    async def check_health(self) -> None:
        """Called by Serve every few seconds; raising makes it replace this replica."""
        self._residency.check_health()


deployment: serve.Deployment = serve.deployment(name="replica")(serve.ingress()(Replica))
"""What an application is bound from; its options are the pool's business."""
