"""The ports of a replica: the socket that a node's replicas share, and a way between them."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from clsnf.core.hashing import content_key
from clsnf.serving.affinity import ModelAffinity, PassedOn, Peers
from clsnf.serving.http_server import HttpServer, connection_limits
from clsnf.serving.listening import SharedListener
from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings


def settings_version(settings: ServingSettings) -> str:
    """Tells replicas of different settings apart; 12 characters."""
    return content_key(dataclasses.asdict(settings))[:12]


class ReplicaPorts(Ports):
    """The ports of a replica, and its private one, where the other replicas of the node ask.

    Args:
        service: whose settings say where to listen.
        folder: of the listening socket, see :class:`SharedListener`.
    """

    def __init__(self, service: InspectionService, folder: Path) -> None:
        super().__init__(service)
        self._folder = folder
        self._peers = Peers(folder, settings_version(service.settings))
        self._affinity = ModelAffinity(self.app, service, self._peers)
        self.public = self._affinity
        # Peers connect once for each request that they pass on, all from no address.
        limits = dataclasses.replace(connection_limits(service.settings), per_client=0)
        self._private = HttpServer(PassedOn(self.app, service), limits)
        self._listener: SharedListener | None = None

    async def open_shared(self) -> int:
        """Listen on the socket that the replicas of the node share, unless it does; its port.

        Raises:
            SettingsError: there is no listening, or the certificate can't be used.
        """
        if self._listener is None:
            settings = self._service.settings
            listener = await asyncio.to_thread(
                SharedListener, self._folder, settings.host, settings.port
            )
            await self._private.start(self._peers.bind())
            await self.open(listener.socket)
            self._listener = listener
        return self._listener.port

    async def drain(self) -> None:
        """Answer what is under way, and leave the port to the other replicas."""
        if self._listener is None:
            return
        self._peers.leave()
        seconds = self._service.settings.deadline_s
        await asyncio.gather(super().drain(), self._private.drain(seconds))
        await self._affinity.close()
        await asyncio.to_thread(self._listener.close)
