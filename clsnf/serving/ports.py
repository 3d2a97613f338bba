"""The ports of one process that serves: HTTP, and gRPC where it is asked for."""

from __future__ import annotations

import socket
from pathlib import Path

from fastapi import FastAPI
from starlette.types import ASGIApp

from clsnf.serving.app import build_app
from clsnf.serving.grpc_service import GrpcServer, Tls, start_grpc
from clsnf.serving.http_server import HttpServer, connection_limits
from clsnf.serving.listening import tls_context
from clsnf.serving.service import InspectionService
from clsnf.serving.tokens import Tokens


class Ports:
    """Opens the ports that the service's settings name, and drains them before the service closes.

    Args:
        service: answers.

    Attributes:
        app: answers over HTTP; its lifespan starts and ends the service.
    """

    def __init__(self, service: InspectionService) -> None:
        self._service, self._settings = service, service.settings
        self._tokens = Tokens.read(self._settings.token_file, self._settings.asking_needs_token)
        self.app: FastAPI = build_app(service, self._tokens, self.drain)
        self.public: ASGIApp = self.app  # what the HTTP port serves
        self._http: HttpServer | None = None
        self._grpc: GrpcServer | None = None

    async def open(self, listening: socket.socket) -> None:
        """Answer HTTP on a bound socket, and gRPC on the port of the settings.

        Raises:
            SettingsError: the certificate can't be used, or gRPC's port not be opened.
        """
        settings = self._settings
        tls = tls_context(settings.certificate, settings.key)
        if settings.grpc_port:
            files = settings.certificate, settings.key
            self._grpc = await start_grpc(
                self._service,
                settings.host,
                settings.grpc_port,
                Tls(Path(files[0]), Path(files[1])) if files[0] and files[1] else None,
                self._tokens.check_ask if self._tokens.needed_to_ask else None,
            )
        self._http = HttpServer(self.public, connection_limits(settings))
        await self._http.start(listening, tls)

    async def drain(self) -> None:
        """Take nothing more, and answer what is under way."""
        seconds = self._settings.deadline_s
        if self._grpc is not None:
            await self._grpc.stop(seconds)
        if self._http is not None:
            await self._http.drain(seconds)
