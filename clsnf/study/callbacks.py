"""Where trials are logged besides the study's own files: TensorBoard always, MLflow and Weights &
Biases where asked for.
"""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

from clsnf.core.errors import SettingsError

_PORTS = {"http": 80, "https": 443}


def check_loggers(mlflow: str | None, wandb: str | None) -> None:
    """Refuse a logger whose package is not installed, or whose server does not answer. Raises
    SettingsError.
    """
    from importlib.util import find_spec

    for package, wanted in (("mlflow", mlflow), ("wandb", wandb)):
        if wanted is not None and find_spec(package) is None:
            raise SettingsError(
                f"--{package} needs the package {package}, which is not installed: pip install "
                f"'clsnf[{package}]'."
            )
    server = urlsplit(mlflow or "")
    if (
        server.scheme in ("http", "https") and server.hostname
    ):  # MLflow itself would try for minutes, once trials run
        try:
            socket.create_connection(
                (server.hostname, server.port or _PORTS[server.scheme]), timeout=10
            ).close()
        except OSError as error:
            raise SettingsError(
                f"No MLflow server answers at {mlflow} ({error}): start it, or leave --mlflow out."
            ) from error


def loggers(study: str, mlflow: str | None, wandb: str | None) -> list[Any]:
    """Tune's callbacks.

    Args:
        study: its name there.
        mlflow: tracking URI of an MLflow server.
        wandb: a Weights & Biases project.
    """
    from ray.tune.logger import TBXLoggerCallback

    callbacks: list[Any] = [TBXLoggerCallback()]
    if mlflow is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(tracking_uri=mlflow, experiment_name=study))
    if wandb is not None:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=wandb, group=study))
    return callbacks
