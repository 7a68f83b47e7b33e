"""The Store port on SQLite: a file, or memory."""

from trilogue.events import Durability
from trilogue.ports import Feature
from trilogue.stores.append import PAYLOAD_BYTES
from trilogue.stores.database import Database
from trilogue.stores.sqlite_database import SqliteDatabase
from trilogue.stores.store import SqlStore

_IN_A_FILE = frozenset(Feature) - {Feature.MACHINES, Feature.OWN_TRANSACTION}
_IN_MEMORY = _IN_A_FILE - {Feature.PERSISTENT, Feature.SHARED}


class SqliteStore(SqlStore):
    """A Store on SQLite. path: of the file, or `:memory:`."""

    def __init__(
        self,
        path: str,
        url: str,
        *,
        lease_s: float = 10.0,
        payload_bytes: int = PAYLOAD_BYTES,
        wal_bytes: int | None = None,
    ) -> None:
        self.path = path
        self.in_memory = path == ":memory:"
        super().__init__(url, _IN_MEMORY if self.in_memory else _IN_A_FILE, lease_s=lease_s, payload_bytes=payload_bytes)
        self.durability: Durability = "memory" if self.in_memory else "os-crash"
        self._wal_limit = wal_bytes

    async def _connect(self) -> Database:
        db = SqliteDatabase(
            self.path, self.url, wal_limit=self._wal_limit, payload_bytes=self.payload_bytes, scheduled=self._scheduled
        )
        self.path = db.path
        return db
