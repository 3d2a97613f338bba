"""Tune's loggers, beside the study's own files.

TensorBoard logs every study; MLflow and Weights & Biases log those that ask for it.
"""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

from clsnf.core.errors import SettingsError

_PORTS = {"http": 80, "https": 443}


def check_loggers(mlflow: str | None, wandb: str | None) -> None:
    """Refuse a logger whose package is not installed, or whose server does not answer.

    Raises:
        SettingsError: naming the option.
    """
    from importlib.util import find_spec

    for package, wanted in (("mlflow", mlflow), ("wandb", wandb)):
        if wanted is not None and find_spec(package) is None:
            raise SettingsError(
                f"--{package} needs the package {package}, which is not installed: pip install "
                f"'clsnf[{package}]'."
            )
    server = urlsplit(mlflow or "")
    if server.scheme in _PORTS and server.hostname:
        # MLflow itself would try for minutes, after the first trial.
        address = (server.hostname, server.port or _PORTS[server.scheme])
        try:
            socket.create_connection(address, timeout=10).close()
        except OSError as error:
            raise SettingsError(
                f"No MLflow server answers at {mlflow} ({error}): start it, or leave --mlflow out."
            ) from error


def make_loggers(study: str, mlflow: str | None, wandb: str | None) -> list[Any]:
    """Tune's callbacks that log trials.

    Args:
        study: the study's name there.
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
