"""A private Ray listens on loopback alone: nobody on the network reaches its processes.

Who reaches them can run code: Ray unpickles what it is sent. Its own ports ask for a token, those
of Serve's replicas do not. The token is for this user alone: Ray would write it for all to read.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TOKEN, _TOKEN_PATH, _AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"


@contextmanager
def on_loopback() -> Iterator[None]:
    """Start and use a private Ray in the block; its GCS, raylet, agents and workers then listen on
    127.0.0.1.

    Ray's processes listen on all interfaces unless their node's address is loopback, and
    ``ray.init`` turns a loopback address that it is given into the machine's own. It leaves it only
    where Ray's switch for machines that can't be part of a cluster is set,
    ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``. Ray reads that variable when it is imported, which may
    have been long ago, and a connection to a real cluster must not see it.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _private_token():
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _private_token() -> Iterator[None]:
    """See that Ray finds a token that this user alone can read, if the environment names none.

    It lies where Ray looks for it, ``~/.ray/auth_token``. Where the home folder can't be written,
    such as in a container with any user's number, Ray would not start: there the environment of
    this process and its children has the token, as long as the block runs.
    """
    named = _TOKEN in os.environ or _TOKEN_PATH in os.environ
    switched_off = os.environ.get(_AUTH_MODE, "token").lower() != "token"
    if named or switched_off or _token_file_is_there():
        yield
        return
    from ray import _raylet

    loader = getattr(_raylet, "AuthenticationTokenLoader").instance()  # noqa: B009 (not in stubs)
    os.environ[_TOKEN] = secrets.token_hex(32)
    loader.reset_cache()  # it may still have the token of an earlier block
    try:
        yield
    finally:
        del os.environ[_TOKEN]
        loader.reset_cache()


def _token_file_is_there() -> bool:
    """Write Ray's file of the token if there is none; False where that is not possible."""
    try:
        file = Path.home() / ".ray" / "auth_token"
        if file.exists():
            with suppress(OSError):  # somebody else's
                file.chmod(0o600)
            return os.access(file, os.R_OK)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".auth_token.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w") as opened:
                opened.write(secrets.token_hex(32))
            os.link(draft, file)  # whole at once; of two processes the first one's stays
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home folder at all
        return False
    return True


def keep_replica_on_loopback() -> None:
    """In a replica, before Serve opens its port for other deployments: open it on loopback where
    the node is there.

    Serve opens it on all interfaces whatever the node's address is, and has no setting for it.
    """
    from ray.serve._private import replica
    from ray.util import get_node_ip_address

    if get_node_ip_address() != "127.0.0.1":
        return
    open_port = replica.add_port_to_grpc_server

    def on_node(server: Any, address: str) -> int:
        return int(open_port(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = on_node
