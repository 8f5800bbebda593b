"""GET /metrics: what Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from twotower.deployments.telemetry.instruments import Instruments
from twotower.deployments.telemetry.page import cluster_page


def metrics_routes(instruments: Instruments) -> APIRouter:
    """The page of metrics, for administrators."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics of all processes of the service, in Prometheus' text format."""
        here = instruments.text()
        page = await cluster_page() if here is None else here
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return router
