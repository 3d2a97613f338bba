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


@contextmanager
def bucket() -> Iterator[str]:
    """The end of a URI in an empty bucket: ``f"s3://bucket/FOLDER{end}"``."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with mock.patch.dict(os.environ, CREDENTIALS):
        server.start()
        try:
            host, port = server.get_host_and_port()
            end = f"?scheme=http&endpoint_override={host}%3A{port}"
            store, _ = fs.FileSystem.from_uri(f"s3://bucket/{end}&allow_bucket_creation=true")
            store.create_dir("bucket")
            yield end
        finally:
            server.stop()
