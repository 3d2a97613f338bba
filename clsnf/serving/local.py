"""``clsnf serve --local``: the app in this process, without Ray, for one camera on one machine."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path

from uvicorn.config import Config

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.threads import use_torch_threads
from clsnf.serving.listening import bound_socket, check_free, tls_context, url_of
from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings
from clsnf.serving.store import refusals_line


def serve_locally(settings: ServingSettings, report: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP rolls in what the folder of models holds then.

    Args:
        settings: resolved; port 0 for a free one.
        report: called with lines for people.

    Raises:
        ClsnfError: there is no listening, or the models can't be served.
    """
    if settings.max_replicas > 1 or settings.gpus_per_replica:
        raise SettingsError(
            "max_replicas and gpus_per_replica are Ray's: serve without --local, or leave them out."
        )
    use_torch_threads(1)  # this thread computes nothing: the service's own does
    tls_context(settings.certificate, settings.key)  # refused before the models load
    listening = bound_socket(settings.host, settings.port)
    check_free(settings.host, settings.grpc_port)
    settings = dataclasses.replace(settings, port=listening.getsockname()[1])

    async def run() -> None:
        service = InspectionService(settings)
        ports = Ports(service)
        async with ports.app.router.lifespan_context(ports.app):
            await ports.open(listening)
            url = url_of(settings.host, settings.port, settings.certificate is not None)
            report(f"serving {settings.models} at {url} (Ctrl-C ends{_also_reload()})")
            await _until_stopped(service, report)

    with asyncio.Runner(loop_factory=Config(run).get_loop_factory()) as runner:
        runner.run(run())


def _also_reload() -> str:
    return ", SIGHUP reads the models again" if hasattr(signal, "SIGHUP") else ""


async def _until_stopped(service: InspectionService, report: Callable[[str], None]) -> None:
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: object) -> None:
        asked = reload if number == getattr(signal, "SIGHUP", None) else stop
        loop.call_soon_threadsafe(asked.set)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    while not stop.is_set():
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, reload)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if reload.is_set() and not stop.is_set():
            reload.clear()
            try:
                await service.roll(Path(service.settings.models))
                refused = refusals_line(service.store.refused)
                if refused is None:
                    report(f"rolled in what {service.settings.models} holds now")
                else:
                    report(f"not all was rolled in: {refused}")
            except ClsnfError as error:
                report(f"nothing was rolled in: {error}")
