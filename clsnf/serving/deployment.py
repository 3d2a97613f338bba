"""The app on Ray Serve: one deployment that is both the HTTP ingress and the model's replica.

    serve run clsnf.serving.deployment:app models=runs/NAME/winners port=8000

A replica listens on a port of its own (``port``), so that a request reaches it without Ray's HTTP
proxy, which costs several times what the app does. The replicas of a node share one listening
socket (:mod:`clsnf.serving.listening`). Ray's proxy reaches the same app on its own port.

The folder of models travels in the deployment's ``user_config``, because Serve gives a new one to
running replicas without a restart: ``serve deploy`` of a config that differs in it alone rolls new
models in. Its ``generation`` may be raised to read the same folder again. Models that can't be used
are refused, and the replicas go on with what they have. An exception would make Serve replace them
by replicas that can't start.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.memory import keep_freed_memory
from clsnf.core.threads import PASSIVE_THREADS, use_torch_threads
from clsnf.serving.catalogue import read_catalogue_within
from clsnf.serving.listening import listener_folder
from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.ray_metrics import RaySink
from clsnf.serving.replica_ports import ReplicaPorts, settings_version
from clsnf.serving.scaling import REQUESTS
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.serving.store import refusals_line
from clsnf.streams.private_ray import keep_replica_on_loopback

log = logging.getLogger("ray.serve")


# A request that was answered already, or that comes on a connection kept open, may still need it.
_DRAIN_EXTRA_S = 5.0


@serve.ingress()
class Inspector:
    """A replica: a process of its own with the service, and the app around it.

    Args:
        settings: resolved.
        folder: where the replicas of a node share their listening socket; None for one that belongs
            to this application.
    """

    def __init__(self, settings: ServingSettings, folder: str | None = None) -> None:
        keep_freed_memory()
        use_torch_threads(1)  # this thread computes nothing: the service's own does
        keep_replica_on_loopback()
        context = serve.get_replica_context()
        metrics = ServerMetrics(context.replica_id.unique_id, RaySink)
        # Serve calls reconfigure before the first request: it opens the models.
        self._service = InspectionService(settings, metrics, open_models=False)
        self._settings = settings
        shared = Path(folder) if folder else _folder_of(context.app_name, settings)
        self._ports = ReplicaPorts(self._service, shared)
        self._generation = 0

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._ports.app

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Roll in the models of ``config["models"]``, and open the port if it is not yet.

        Raises:
            ClsnfError: they can't be used, and the replica has no others; or there is no listening.
        """
        try:
            generation = config.get("generation", 0)
            known = set(config) - {"generation"} == {"models"}
            if not known or not isinstance(config["models"], str) or type(generation) is not int:
                raise SettingsError(
                    f"user_config is {config!r}: it must be {{models: FOLDER}}, and may have a "
                    "generation, a whole number."
                )
            self._generation = generation
            await self._service.roll(Path(config["models"]))
        except ClsnfError as error:
            if not self._service.ready:
                raise
            log.error("new models are refused, those of before go on: %s", error)
        if self._settings.port:
            await self._ports.open_shared()

    def rolled(self) -> tuple[int, str | None]:
        """The generation of the newest roll-in, and what was refused of it, if anything was."""
        return self._generation, refusals_line(self._service.store.refused)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Ray's autoscaler, see :mod:`clsnf.serving.scaling`."""
        return {REQUESTS: float(self._service.requests)}

    async def check_health(self) -> None:
        """Raise RuntimeError where Serve must replace this replica."""
        self._service.check_alive()


def _folder_of(application: str, settings: ServingSettings) -> Path:
    cluster = ray.get_runtime_context().gcs_address
    return listener_folder(cluster, application, settings.host, str(settings.port))


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


def bind_application(
    settings: ServingSettings, folder: Path | None = None, generation: int = 0
) -> Application:
    """The application of resolved settings.

    Args:
        settings: of all replicas.
        folder: see :class:`Inspector`.
        generation: raised to make running replicas read their models again.
    """
    scaling: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.min_replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_requests,
                upscale_delay_s=5,
                downscale_delay_s=120,
                policy=AutoscalingPolicy(policy_function="clsnf.serving.scaling:by_requests"),
            )
        }
    deployment = serve.deployment(
        name="Inspector",
        logging_config=LoggingConfig(enable_access_log=False),
        user_config={"models": settings.models, "generation": generation},
        # A replica refuses by itself, because it knows its queue; these limits stand behind it.
        max_ongoing_requests=2 * settings.queue,
        max_queued_requests=settings.queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_surge_percent=100,  # replicas of a new version serve before those of the old one end
        graceful_shutdown_timeout_s=2 * settings.deadline_s + _DRAIN_EXTRA_S,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": PASSIVE_THREADS},
        },
        **scaling,
    )
    inspector = deployment(Inspector)
    # Equal versions differ in user_config alone, which Serve gives to the replicas that run. Its
    # own would be a random one for each call of serve.run.
    inspector._version = settings_version(settings)
    return inspector.bind(settings, folder and str(folder))
