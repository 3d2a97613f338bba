"""Optuna studies in a database that may be away for a while: locked, restarted, unreachable."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import make_url

from clsnf.core.patience import Patience

_LOCKED_FOR = 5.0  # seconds that sqlite itself waits for a lock


class PatientDatabase(RDBStorage):
    """Optuna's storage in a database; each of its methods waits while the database is away.

    Each method is one transaction, so an attempt that failed left nothing.

    Attributes:
        patience: None until the storage is open: to a wrong URL the answer comes at once.
    """

    patience: Patience | None = None


def _patiently(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(self: PatientDatabase, *args: Any, **kwargs: Any) -> Any:
        if self.patience is None:
            return method(self, *args, **kwargs)
        return self.patience.wait_for(lambda: method(self, *args, **kwargs))

    return wrapper


for _name in sorted(BaseStorage.__abstractmethods__):
    setattr(PatientDatabase, _name, _patiently(getattr(RDBStorage, _name)))


def open_database(url: str, patience: Patience) -> RDBStorage:
    """The storage in the database at a URL, such as ``sqlite:////absolute/studies.db``.

    Raises:
        Exception: it can't be opened; SQLAlchemy's errors, ImportError, ValueError.
    """
    arguments: dict[str, Any] = {"pool_pre_ping": True}  # a server may have closed connections
    if make_url(url).get_backend_name() == "sqlite":
        arguments["connect_args"] = {"timeout": _LOCKED_FOR}
    storage = PatientDatabase(url, engine_kwargs=arguments)
    storage.patience = patience
    return storage
