"""An S3 service on this machine, for tests of remote folders: moto's server, in a thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from moto.server import ThreadedMotoServer
from pyarrow import fs

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class StoppableBucket:
    """A bucket whose server can be stopped and started again, at the same address.

    What is in it is the process's: another server of the same process finds it again, so each test
    needs a folder of its own.

    Attributes:
        end: of a URI in it: ``f"s3://bucket/FOLDER{end}"``.
    """

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self._port = port
        self.end = f"?scheme=http&endpoint_override={host}%3A{port}"
        store, _ = fs.FileSystem.from_uri(f"s3://bucket/{self.end}&allow_bucket_creation=true")
        store.create_dir("bucket")

    def stop(self) -> None:
        """Nobody answers any more; what is stored stays."""
        self._server.stop()

    def start(self) -> None:
        """Answer again."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()


@contextmanager
def stoppable_bucket() -> Iterator[StoppableBucket]:
    """A bucket whose server can be stopped."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    with mock.patch.dict(os.environ, CREDENTIALS):
        store = StoppableBucket()
        try:
            yield store
        finally:
            store.stop()


@contextmanager
def bucket() -> Iterator[str]:
    """The end of a URI in a bucket: ``f"s3://bucket/FOLDER{end}"``; see StoppableBucket."""
    with stoppable_bucket() as store:
        yield store.end
