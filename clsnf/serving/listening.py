"""The listening socket of a server, shared by its processes on one machine.

The first process binds the address. Each holder of the socket gives it, over a Unix socket in a
folder that only its user can enter, to the processes that come later: replicas that start beside it
or after it. So all of them accept from one queue of connections. None is lost when a replica goes:
another one accepts it, or the next one that starts. The address stays the same, and a second server
is told that it is taken, which it would not be with the kernel's SO_REUSEPORT.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import stat
import tempfile
import threading
import uuid
from pathlib import Path

from filelock import FileLock

from clsnf.core.errors import SettingsError

TLS_CERTIFICATE, TLS_KEY = "CLSNF_TLS_CERT", "CLSNF_TLS_KEY"
_GIVEN = b"listening"
_TIMEOUT_S = 5.0


class SharedListener:
    """A bound socket that the processes of one server share.

    Args:
        folder: of the Unix sockets, the same for all processes of the server; made if absent.
        host, port: where to listen if no other process does already; port 0 for a free one.

    Attributes:
        socket: bound, for ``listen`` and ``accept``.

    Raises:
        SettingsError: somebody else listens there, or there is no such address.
    """

    def __init__(self, folder: Path, host: str, port: int) -> None:
        _make_private(folder)
        with FileLock(folder / "lock", timeout=60):
            self.socket = _taken_over(folder) or bound_socket(host, port)
            self._path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.sock"
            self._giving = socket.socket(socket.AF_UNIX)
            self._giving.bind(str(self._path))
            self._giving.listen(64)
        self._given = self.socket.dup()  # the socket itself belongs to who listens
        threading.Thread(target=self._give, name="listener", daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self._given.getsockname()[1]
        return port

    def close(self) -> None:
        """Give the socket to nobody any more, and close this process's hold of it."""
        with contextlib.suppress(OSError):
            self._giving.shutdown(socket.SHUT_RDWR)
        self._giving.close()
        self._path.unlink(missing_ok=True)
        self._given.close()
        self.socket.close()

    def _give(self) -> None:
        while True:
            try:
                asking, _ = self._giving.accept()
            except OSError:  # closed
                return
            with asking, contextlib.suppress(OSError):
                asking.settimeout(_TIMEOUT_S)
                socket.send_fds(asking, [_GIVEN], [self._given.fileno()])


def url_of(host: str, port: int, tls: bool) -> str:
    """Where a server is asked."""
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}/"


def tls_files() -> dict[str, str]:
    """The settings ``certificate`` and ``key`` from the environment; empty where it names none.

    Raises:
        SettingsError: the environment names one of both files only.
    """
    found = {name: os.environ.get(name) for name in (TLS_CERTIFICATE, TLS_KEY)}
    missing = [name for name, value in found.items() if not value]
    if len(missing) == 1:
        raise SettingsError(
            f"{missing[0]} is not set: HTTPS needs both {TLS_CERTIFICATE} and {TLS_KEY}."
        )
    certificate, key = found.values()
    return {"certificate": certificate, "key": key} if certificate and key else {}


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with the certificate's chain; None without a certificate.

    Raises:
        SettingsError: a file can't be read, or they do not belong together.
    """
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(
            f"The certificate {certificate} and its key {key} can't be used ({error}): check both "
            "files."
        ) from error
    return context


def listener_folder(*identity: str) -> Path:
    """The folder for :class:`SharedListener` of a server that `identity` tells from all others."""
    # Short, because the path of a Unix socket has 107 bytes at most.
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"clsnf-{os.getuid()}" / name


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can enter. Raises SettingsError."""
    for part in (folder.parent, folder):
        part.mkdir(mode=0o700, exist_ok=True)
        status = part.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise SettingsError(
                f"{part} belongs to another user: remove it, or set TMPDIR to a folder of yours."
            )


def _taken_over(folder: Path) -> socket.socket | None:
    """The socket from a process that holds it; None where none does."""
    for path in sorted(folder.glob("*.sock")):
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(_TIMEOUT_S)
            try:
                asking.connect(str(path))
                message, descriptors, _, _ = socket.recv_fds(asking, len(_GIVEN), 1)
            except OSError:
                path.unlink(missing_ok=True)  # its process is gone
                continue
            if message == _GIVEN and descriptors:
                return socket.socket(fileno=descriptors[0])
    return None


def check_free(host: str, port: int) -> None:
    """Check that nobody listens there, nor would share the port; 0 is free always.

    Raises:
        SettingsError: somebody does, or there is no such address.
    """
    if port:
        bound_socket(host, port).close()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that this process alone listens on; port 0 for a free one. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()  # at once: another server is told so from now on
        except BaseException:
            bound.close()
            raise
        return bound
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"There is no listening at {host}:{port} ({error}): choose another --host or --port."
        ) from error
