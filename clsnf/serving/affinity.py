"""A replica lets another one answer about a model that it has no room for.

The replicas of a node accept from one socket, so any of them gets any request. Where each would
load every model, the models would push each other out. So each category has an *owner* among the
replicas of a node: the first by rendezvous hashing, so that few categories move when a replica
comes or goes. A replica that would have to drop a model to load another one passes the request on
to the owner, over a Unix socket in the folder that the replicas share. It answers itself where it
holds the model or has room for it, where it is the owner, and where the owner does not take the
request: it has gone, has enough to do (so models in demand spread), or has other models.

The request's head goes ahead, with ``Expect: 100-continue``: its body is read only when the owner
takes it, and then passes through piece by piece. Tokens, limits, budgets and metrics are the
owner's, which is told the client's address; connections are bounded where they come in.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.errors import ServiceUnavailable
from clsnf.serving.responses import json_answer
from clsnf.serving.schemas import Problem
from clsnf.serving.service import InspectionService

# What is asked about a model's pictures; whoever answers has to load the model.
_ASKED = re.compile(r"/v[12]/models/([^/]+)/.+")
_CLIENT, _VERSION, _NOT_TAKEN = "clsnf-client", "clsnf-model-version", "clsnf-not-taken"
_HOP_BY_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
_NOT_PASSED = _HOP_BY_HOP | {b"expect", _CLIENT.encode(), _VERSION.encode()}
_NOT_RETURNED = _HOP_BY_HOP | {b"date"}
_CONNECT_S = 2.0
_IDLE_S = 30.0  # for which a connection to a peer is kept


class Peers:
    """The Unix sockets of a node's replicas.

    Args:
        folder: that the replicas share; there is one already.
        group: replicas of another group don't count, such as those of an earlier version.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self._folder, self._start = folder, f"{group}-"
        self._own = f"{self._start}{os.getpid()}-{uuid.uuid4().hex[:8]}.http"

    def bind(self) -> socket.socket:
        """This replica's own socket; from now on it is a peer of the others."""
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(self._folder / self._own))
        bound.listen()
        return bound

    def leave(self) -> None:
        """Be no peer any more."""
        self.forget(self._own)

    def forget(self, name: str) -> None:
        """Remove the socket of a replica that has gone."""
        (self._folder / name).unlink(missing_ok=True)

    def owner(self, category: str) -> str | None:
        """The peer that a category belongs to; None where it is this replica."""
        with os.scandir(self._folder) as found:
            names = [
                entry.name
                for entry in found
                if entry.name.startswith(self._start) and entry.name.endswith(".http")
            ]
        if len(names) < 2:
            return None
        first = max(names, key=lambda name: hashlib.sha256(f"{name}\0{category}".encode()).digest())
        return None if first == self._own else first

    def connector(self, name: str) -> aiohttp.UnixConnector:
        return aiohttp.UnixConnector(
            str(self._folder / name), limit=0, keepalive_timeout=_IDLE_S, force_close=False
        )


class PassedOn:
    """ASGI middleware of a replica's Unix socket: takes the requests that peers pass on, or not.

    Args:
        app: answers.
        service: of the same replica.
    """

    def __init__(self, app: ASGIApp, service: InspectionService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if not self._takes(scope["path"], headers.get(_VERSION)):
            # Nobody but the peer sees this answer. Its body was not sent, so neither can follow.
            refusal = Response(status_code=503, headers={_NOT_TAKEN: "1", "Connection": "close"})
            await refusal(scope, receive, send)
            return
        client = headers.get(_CLIENT)
        await self._app(dict(scope) | {"client": (client, 0) if client else None}, receive, send)

    def _takes(self, path: str, version: str | None) -> bool:
        service, asked = self._service, _ASKED.fullmatch(path)
        entry = service.store.catalogue.entries.get(asked[1]) if asked else None
        if entry is None or entry.version != version:
            return False
        try:
            service.check_ready()
        except ServiceUnavailable:
            return False
        return service.requests < service.settings.target_requests


class ModelAffinity:
    """ASGI middleware of a replica's own port.

    Args:
        app: answers what is not passed on.
        service: of the same replica.
        peers: the replicas of the node.
    """

    def __init__(self, app: ASGIApp, service: InspectionService, peers: Peers) -> None:
        self._app, self._service, self._peers = app, service, peers
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry = self._without_room(scope)
        owner = None if entry is None else self._peers.owner(entry.category)
        if entry is None or owner is None or not _is_plain(scope):
            await self._app(scope, receive, send)
            return
        passing = _Passing(scope, receive, entry)
        outcome = await passing.to(self._session(owner), send)
        if outcome == "not reached":
            await self._forget(owner)
        if outcome in ("not reached", "not taken"):
            await self._app(scope, receive, send)
        self._service.metrics.record("clsnf_passed_on_total", 1, entry.category, outcome)

    def _without_room(self, scope: Scope) -> ModelEntry | None:
        """The model that a request asks, if another one would have to go for it."""
        asked = _ASKED.fullmatch(scope["path"])
        if asked is None or not (scope["method"] == "POST" or scope["path"].endswith("/ready")):
            return None
        store = self._service.store
        entry = store.catalogue.entries.get(asked[1])
        return entry if entry is not None and store.lacks_room_for(entry) else None

    def _session(self, peer: str) -> aiohttp.ClientSession:
        if peer not in self._sessions:
            self._sessions[peer] = aiohttp.ClientSession(
                connector=self._peers.connector(peer),
                # The owner bounds the time of a request.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._sessions[peer]

    async def _forget(self, peer: str) -> None:
        self._peers.forget(peer)
        session = self._sessions.pop(peer, None)
        if session is not None:
            await session.close()

    async def close(self) -> None:
        """Close the connections to the others."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()


class _Passing:
    """One request on its way to another replica."""

    def __init__(self, scope: Scope, receive: Receive, entry: ModelEntry) -> None:
        self._scope, self._receive, self._entry = scope, receive, entry
        self._taken = False  # the owner has asked for the body
        self._whole, self._gone = asyncio.Event(), False

    async def to(self, session: aiohttp.ClientSession, send: Send) -> str:
        """Let a peer answer.

        Returns:
            "answered"; "not taken" or "not reached", when nothing was read of the request and
            nothing sent; "lost", when the client was told to ask again; "left" by the client.
        """
        asked = asyncio.create_task(self._ask(session))
        leaving = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait({asked, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return "left"
            answer = await asked
            async with answer:
                if _NOT_TAKEN in answer.headers:
                    return "not taken"
                await _return(answer, send)
                return "answered"
        except aiohttp.ClientConnectorError as error:
            gone = isinstance(error.os_error, ConnectionRefusedError | FileNotFoundError)
            return "not reached" if gone else "not taken"
        except aiohttp.ClientError:
            if self._gone:
                return "left"
            if not self._taken:
                return "not taken"
            await self._lost(send)
            return "lost"
        finally:
            for task in (asked, leaving):
                task.cancel()
            await asyncio.gather(asked, leaving, return_exceptions=True)

    async def _ask(self, session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        scope = self._scope
        target = scope["raw_path"].decode()
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode()
        client = scope["client"]
        headers = [
            (name.decode(), value.decode())
            for name, value in scope["headers"]
            if name not in _NOT_PASSED
        ]
        headers += [(_CLIENT, client[0] if client else ""), (_VERSION, self._entry.version)]
        has_body = scope["method"] == "POST"
        return await session.request(
            scope["method"],
            URL(f"http://replica{target}", encoded=True),
            headers=headers,
            data=self._body() if has_body else None,
            expect100=has_body,
            allow_redirects=False,
        )

    async def _body(self) -> AsyncIterator[bytes]:
        self._taken = True
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._gone = True
                raise ConnectionResetError
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        self._whole.set()

    async def _until_gone(self) -> None:
        """Wait for the client's leaving; its body is read elsewhere."""
        if self._scope["method"] == "POST":
            await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _lost(self, send: Send) -> None:
        problem = Problem(error="The replica that had the request has gone: send it again.")
        await json_answer(problem, 503, {"Retry-After": "1"})(self._scope, self._receive, send)


async def _return(answer: aiohttp.ClientResponse, send: Send) -> None:
    """Send a peer's answer, piece by piece."""
    headers = [
        (name.lower(), value)
        for name, value in answer.raw_headers
        if name.lower() not in _NOT_RETURNED
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    async for piece in answer.content.iter_any():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _is_plain(scope: Scope) -> bool:
    """Whether aiohttp would send a request's head as it came."""
    texts = [part for header in scope["headers"] for part in header]
    return all(text.isascii() for text in (*texts, scope["raw_path"], scope["query_string"]))
