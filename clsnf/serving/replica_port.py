"""The port of a replica: the socket that a node's replicas share, and a way between them."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from starlette.types import ASGIApp

from clsnf.core.hashing import content_key
from clsnf.serving.affinity import ModelAffinity, PassedOn, Peers
from clsnf.serving.http_server import HttpServer, connection_limits
from clsnf.serving.listening import SharedListener, tls_context
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings


def settings_version(settings: ServingSettings) -> str:
    """Tells replicas of different settings apart; 12 characters."""
    return content_key(dataclasses.asdict(settings))[:12]


class ReplicaPort:
    """Serves a replica's app in the running event loop until :meth:`close`.

    Args:
        app: of the service.
        service: whose settings say where to listen.
        folder: of the listening socket, see :class:`SharedListener`.
    """

    def __init__(self, app: ASGIApp, service: InspectionService, folder: Path) -> None:
        self._app, self._service, self._folder = app, service, folder
        limits = connection_limits(service.settings)
        self._peers = Peers(folder, settings_version(service.settings))
        self._affinity = ModelAffinity(app, service, self._peers)
        self._public = HttpServer(self._affinity, limits)
        # Peers connect once for each request that they pass on, all from no address.
        self._private = HttpServer(
            PassedOn(app, service), dataclasses.replace(limits, per_client=0)
        )
        self._listener: SharedListener | None = None

    async def open(self) -> int:
        """Listen, unless it does; the port.

        Raises:
            SettingsError: there is no listening, or the certificate can't be used.
        """
        if self._listener is None:
            settings = self._service.settings
            tls = tls_context(settings.certificate, settings.key)
            listener = await asyncio.to_thread(
                SharedListener, self._folder, settings.host, settings.port
            )
            await self._private.start(self._peers.bind())
            await self._public.start(listener.socket, tls)
            self._listener = listener
        return self._listener.port

    async def close(self) -> None:
        """Answer what is under way, and leave the port to the other replicas."""
        if self._listener is None:
            return
        self._peers.leave()
        seconds = self._service.settings.deadline_s
        await asyncio.gather(self._public.drain(seconds), self._private.drain(seconds))
        await self._affinity.close()
        await asyncio.to_thread(self._listener.close)
