"""A private Ray listens on loopback alone: nobody on the network reaches its processes.

Who reaches them can run code: Ray unpickles what it is sent. Its own ports ask for a token, those
of Serve's replicas do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


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
