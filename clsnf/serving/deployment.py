"""The app on Ray Serve: one deployment that is both the HTTP ingress and the model's replica.

    serve run clsnf.serving.deployment:app models=runs/NAME/winners

The folder of models travels in the deployment's ``user_config``, because Serve gives a new one to
running replicas without a restart: ``serve deploy`` of a config that differs in it alone rolls new
models in. Models that can't be used are refused, and the replicas go on with what they have. An
exception would make Serve replace them by replicas that can't start.
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
from clsnf.core.memory import keep_freed_memory
from clsnf.core.threads import PASSIVE_THREADS
from clsnf.serving.app import build_app
from clsnf.serving.catalogue import read_catalogue_within
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.ray_metrics import RaySink
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.streams.private_ray import keep_replica_on_loopback

log = logging.getLogger("ray.serve")


@serve.ingress()
class Inspector:
    """A replica: a process of its own with the service, and the app around it."""

    def __init__(self, settings: ServingSettings) -> None:
        keep_freed_memory()
        keep_replica_on_loopback()
        replica = serve.get_replica_context().replica_id.unique_id
        metrics = ServerMetrics(replica, RaySink)
        # Serve calls reconfigure before the first request: it opens the models.
        self._service = InspectionService(settings, metrics, open_models=False)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._service)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Roll in the models of ``config["models"]``.

        Raises:
            ClsnfError: they can't be used, and the replica has no others.
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
        """Raise RuntimeError where Serve must replace this replica."""
        self._service.check_alive()


def app(args: dict[str, Any]) -> Application:
    """The application for ``serve run`` and ``serve deploy``.

    Args:
        args: fields of :class:`ServingSettings`.

    Raises:
        SettingsError: an argument is wrong, or there are no models that fit.
        ModelError: a model is damaged.
    """
    settings = ServingSettings.from_args(args)
    # Checked now, because Serve tries replicas that can't start again for minutes.
    read_catalogue_within(Path(settings.models), settings.memory_mb * MiB)
    return bind_application(settings)


def bind_application(settings: ServingSettings) -> Application:
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
        # A replica refuses by itself, because it knows its queue; these limits stand behind it.
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
