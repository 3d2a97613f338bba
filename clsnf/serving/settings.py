"""How a server serves: the app's arguments and the command's ``--set`` are fields of one type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.core.config import from_dict, setting
from clsnf.core.errors import SettingsError
from clsnf.core.yaml import parse_yaml
from clsnf.detector_folders import folder_of_detectors
from clsnf.serving.hosts import is_loopback, listed_hosts, listed_origins

MiB = 2**20


@dataclass(frozen=True)
class ServingSettings:
    """What decides how a server answers, beside its models. Sizes are per replica."""

    models: str = setting(
        "", "folder of a study, of saved detectors such as its winners, or of one detector"
    )
    state: str | None = setting(
        None, "folder of thresholds that people set (null: serving, beside models)"
    )
    token_file: str | None = setting(None, "file of the token (null: the environment)")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting(
        "auto",
        "auto: mixed on CUDA, else float32; mixed: bfloat16 in backbone and decoder",
        ("auto", "float32", "mixed"),
    )
    memory_mb: int = setting(
        2048, "MiB of the parameters of loaded models; the least recently used go first"
    )
    preload: bool = setting(
        False, "load as many models as fit at the start; false: each on its first use"
    )
    batch_size: int = setting(0, "images in a batch of the network; 0: 4 on a CPU, else 16")
    images_per_request: int = setting(
        16, "images that one request may hold; they are always one batch"
    )
    batch_wait_ms: float = setting(0.0, "how long a batch that is not full waits for more images")
    queue: int = setting(64, "images that may wait in a replica; beyond, requests get 429")
    deadline_s: float = setting(30.0, "seconds from a request's start after which it gets 504")
    max_megabytes: int = setting(64, "size of a request's body in MiB; beyond, requests get 413")
    max_megapixels: int = setting(50, "size of an image by its header; beyond, requests get 400")
    threads: int = setting(
        0, "threads of the network; 0: the machine's cores, divided by max_replicas"
    )
    readers: int = setting(2, "processes that decode and resize images and draw maps")
    min_replicas: int = setting(1, "replicas that always run")
    max_replicas: int = setting(1, "replicas when queues grow")
    target_requests: float = setting(8.0, "requests per replica that scaling aims at")
    cpus_per_replica: float = setting(1.0, "CPU cores that Ray sets aside for a replica")
    gpus_per_replica: float = setting(
        0.0, "GPUs that Ray sets aside for a replica, such as 1 or 0.25"
    )
    host: str = setting("127.0.0.1", "address that replicas listen on; 0.0.0.0 for all")
    port: int = setting(0, "port that replicas listen on; 0: behind Ray's proxy alone")
    grpc_port: int = setting(0, "port for the Open Inference Protocol over gRPC; 0: none")
    certificate: str | None = setting(None, "file of the certificate for HTTPS (null: HTTP)")
    key: str | None = setting(None, "file of the certificate's key")
    connections: int = setting(1000, "connections that may be open")
    connections_per_client: int = setting(
        100, "connections that may be open from one address; 0: any, as behind a proxy"
    )
    idle_s: float = setting(75.0, "seconds that a connection may be open between two requests")
    ask_token: bool | None = setting(
        None,
        "whether asking needs the token too, not only changes (null: where host is no loopback)",
    )
    allowed_hosts: str = setting(
        "", "names by which clients may ask, beside addresses and the machine's own (*: any)"
    )
    allowed_origins: str = setting(
        "", "pages of other servers that may ask, such as https://mes.plant.local"
    )
    read_s: float = setting(
        10.0, "seconds that reading the images of a body may take; beyond, requests get 504"
    )
    bodies_mb: int = setting(
        256,
        "MiB of the bodies of all requests under way, half of it for one client; beyond, requests "
        "get 429",
    )

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise SettingsError(
                    f"serving.{name} is {getattr(self, name)!r}: it must be {rule}."
                )

        check("precision", self.precision in ("auto", "float32", "mixed"), "auto, float32 or mixed")
        for name in (
            "memory_mb",
            "images_per_request",
            "queue",
            "max_megabytes",
            "readers",
            "min_replicas",
            "connections",
        ):
            check(name, getattr(self, name) >= 1, "1 or more")
        most = self.images_per_request
        check(
            "queue",
            self.queue >= most,
            f"images_per_request ({most}) or more, or a full request could never enter",
        )
        check(
            "max_replicas",
            self.max_replicas >= self.min_replicas,
            f"min_replicas ({self.min_replicas}) or more",
        )
        check("max_megapixels", 1 <= self.max_megapixels <= 100, "from 1 to 100")
        for name in (
            "batch_size",
            "threads",
            "batch_wait_ms",
            "cpus_per_replica",
            "gpus_per_replica",
            "connections_per_client",
        ):
            check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("port", "grpc_port"):
            check(name, 0 <= getattr(self, name) <= 65535, "from 0 to 65535")
        for name, other in (("certificate", "key"), ("key", "certificate")):
            check(name, bool(getattr(self, name)) or not getattr(self, other), f"set with {other}")
        check(
            "bodies_mb",
            self.bodies_mb >= 2 * self.max_megabytes,
            f"twice max_megabytes ({self.max_megabytes}) or more, because half of it is for one "
            "client",
        )
        for name in ("deadline_s", "target_requests", "idle_s", "read_s"):
            check(name, getattr(self, name) > 0, "above 0")
        listed_hosts(self.allowed_hosts)
        listed_origins(self.allowed_origins)

    @property
    def asking_needs_token(self) -> bool:
        """Whether requests that ask must give the token too."""
        return not is_loopback(self.host) if self.ask_token is None else self.ask_token

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ServingSettings:
        """Settings from an app's arguments.

        Args:
            args: plain values of a config file, or texts of ``serve run ... NAME=VALUE``.

        Raises:
            SettingsError: an unknown name, or a value that makes no sense.
        """
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}

        def plain(name: str, value: Any) -> Any:
            if not isinstance(value, str) or "str" in str(kinds.get(name, "str")):
                return value
            return parse_yaml(value, f"serving.{name}")

        values = {name: plain(name, value) for name, value in args.items()}
        return from_dict(cls, values, "serving").resolved()

    def resolved(self) -> ServingSettings:
        """The same settings with absolute paths.

        Raises:
            SettingsError: there is no such folder of models.
        """
        if not self.models:
            raise SettingsError(
                "There are no models: give models=FOLDER, such as models=runs/NAME/winners."
            )
        models = folder_of_detectors(Path(self.models).expanduser().absolute())
        if not models.is_dir():
            raise SettingsError(
                f"There is no folder of models {models}: give a path that this machine reaches, "
                "best a whole one."
            )
        state = (
            Path(self.state).expanduser().absolute() if self.state else models.parent / "serving"
        )
        files: dict[str, Any] = {
            name: None if file is None else str(Path(file).expanduser().absolute())
            for name in ("token_file", "certificate", "key")
            for file in [getattr(self, name)]
        }
        return dataclasses.replace(self, models=str(models), state=str(state), **files)
