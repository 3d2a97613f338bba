"""The app on Ray Serve: one deployment that is both the HTTP ingress and the model's replica.

    serve run clsnf.serving.deployment:app models=runs/NAME/winners

Unusual: the folder of models travels in the deployment's ``user_config``, because Serve hands a new
    one to running replicas without
restarting them: ``serve deploy`` of a config that differs there alone rolls new winners in. What
can't be rolled in is refused, and the replicas go on with what they have; raising would make Serve
replace them by replicas that can't start.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.threads import PASSIVE_THREADS
from clsnf.serving.app import build_app
from clsnf.serving.metrics import Meters
from clsnf.serving.ray_metrics import RaySink
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.serving.store import read_fitting

log = logging.getLogger("ray.serve")


@serve.ingress()
class Inspector:
    """A replica: the service, and the app around it."""

    def __init__(self, settings: ServingSettings) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        self._service = InspectionService(settings, Meters(replica, RaySink), open_models=False)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._service)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Roll in the models of ``config["models"]``.

        Raises:
            ClsnfError: they can't be used, and there are none before them.
        """
        try:
            if set(config) != {"models"} or not isinstance(config["models"], str):
                raise SettingsError(f"user_config is {config!r}: it must be {{models: FOLDER}}.")
            await self._service.roll(Path(config["models"]))
        except ClsnfError as error:
            if not self._service.ready:
                raise
            log.error("new models are refused, those of before go on: %s", error)

    async def check_health(self) -> None:
        """Raise where this replica must be replaced."""
        self._service.check_alive()


def app(args: dict[str, Any]) -> Application:
    """The application for ``serve run`` and ``serve deploy``; arguments are the fields of
    :class:`ServingSettings`.

    Raises:
        SettingsError: an argument is wrong, or there are no models that fit.
        ModelError: a model is damaged.
    """
    settings = ServingSettings.from_args(args)
    read_fitting(
        Path(settings.models), settings.memory_mb * MiB
    )  # now, because replicas that can't start are tried again for minutes
    return bound(settings)


def bound(settings: ServingSettings) -> Application:
    """The application of resolved settings."""
    scaling: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.min_replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_requests,
                upscale_delay_s=5,
                downscale_delay_s=120,
            )
        }
    deployment = serve.deployment(
        name="Inspector",
        logging_config=LoggingConfig(enable_access_log=False),
        user_config={"models": settings.models},
        # A replica refuses by itself, with what it knows of its queue; Serve's own queue is the net
        # behind it.
        max_ongoing_requests=2 * settings.queue,
        max_queued_requests=settings.queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_surge_percent=100,  # replicas of a new version serve before those of the old one end
        graceful_shutdown_timeout_s=settings.deadline_s + 5,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": PASSIVE_THREADS},
        },
        **scaling,
    )
    return deployment(Inspector).bind(settings)
