"""Optuna studies in a database that may be away for a while: locked, restarted, unreachable."""

from __future__ import annotations

import abc
import sqlite3
from collections.abc import Callable
from functools import wraps
from typing import Any

from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy.engine import make_url

from clsnf.core.patience import Patience, find_outage

_LOCKED_FOR = 5.0  # seconds that sqlite itself waits for a lock
# What sqlite says for a while, and not because the URL is wrong.
_SQLITE_BUSY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PROTOCOL,
}
# The same of PostgreSQL and MySQL, which give it no code where a connection fails.
_SERVER_BUSY = ("starting up", "shutting down", "recovery mode", "too many")


def _patient(storage: type[PatientStorage]) -> type[PatientStorage]:
    """Fill in the methods of a storage: each calls that of the storage inside."""

    def forward(name: str) -> Callable[..., Any]:
        @wraps(getattr(BaseStorage, name), updated=())
        def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
            inner = getattr(self.inner, name)
            return self.patience.wait_for(lambda: inner(*args, **kwargs))

        return method

    for name in sorted(BaseStorage.__abstractmethods__):
        setattr(storage, name, forward(name))
    abc.update_abstractmethods(storage)
    return storage


@_patient
class PatientStorage(BaseStorage):
    """An Optuna storage each of whose methods waits while the storage is away.

    Each method of a database's storage is one transaction: an attempt that failed left nothing.

    Args:
        inner: the storage.
        patience: with it.
    """

    def __init__(self, inner: BaseStorage, patience: Patience) -> None:
        self.inner, self.patience = inner, patience

    def remove_session(self) -> None:
        """Close what the storage has open."""
        self.inner.remove_session()


def open_database(url: str, patience: Patience, is_known: bool = False) -> BaseStorage:
    """The storage in the database at a URL, such as ``sqlite:////absolute/studies.db``.

    Args:
        url: of the database.
        patience: with it. While it is opened, a database that says that it is busy is waited for;
            to a wrong URL the answer comes at once.
        is_known: the study has used it before: a server that can't be reached is waited for too.

    Raises:
        OutageError: it was busy, or away, for too long.
        Exception: it can't be opened; SQLAlchemy's errors, ImportError, ValueError.
    """
    arguments: dict[str, Any] = {"pool_pre_ping": True}  # a server may have closed connections
    if make_url(url).get_backend_name() == "sqlite":
        arguments["connect_args"] = {"timeout": _LOCKED_FOR}
    database = patience.wait_for(
        lambda: get_storage(RDBStorage(url, engine_kwargs=arguments)),  # with Optuna's cache
        outage=lambda error: _may_be_waited_for(error, is_known),
    )
    return PatientStorage(database, patience)  # type: ignore[abstract]


def _may_be_waited_for(error: BaseException, is_known: bool) -> bool:
    """Whether an error at opening may pass, and is none of a wrong URL."""
    outage = find_outage(error)
    if outage is None:
        return False
    code = getattr(getattr(outage, "orig", None), "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_BUSY  # without sqlite's details, in the higher bits
    return is_known or any(words in str(outage).lower() for words in _SERVER_BUSY)
