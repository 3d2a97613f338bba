"""Optuna studies in a database that may be away for a while: locked, restarted, unreachable."""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import wraps
from typing import Any

from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy.engine import make_url

from clsnf.core.patience import Patience

_LOCKED_FOR = 5.0  # seconds that sqlite itself waits for a lock


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


def open_database(url: str, patience: Patience) -> BaseStorage:
    """The storage in the database at a URL, such as ``sqlite:////absolute/studies.db``.

    Args:
        url: of the database.
        patience: with it, once it is open: to a wrong URL the answer comes at once.

    Raises:
        Exception: it can't be opened; SQLAlchemy's errors, ImportError, ValueError.
    """
    arguments: dict[str, Any] = {"pool_pre_ping": True}  # a server may have closed connections
    if make_url(url).get_backend_name() == "sqlite":
        arguments["connect_args"] = {"timeout": _LOCKED_FOR}
    database = get_storage(RDBStorage(url, engine_kwargs=arguments))  # with Optuna's cache
    return PatientStorage(database, patience)  # type: ignore[abstract]
