"""Leaving no bytes behind: what is deleted stays readable in the files for a while, until they are written anew.

video.db        pages that were split keep copies of rows, freed pages all of theirs   ──vacuum──▶  only what is there
video.db-wal    the pages as they were at each commit                                  ──truncate──▶  empty

secure_delete is not enough: SQLite moves rows between pages without it, and the copies stay (a dozen in 6,000 changes of rows
of all lengths). Only the user's tables hold what has to go, so without any the file is left as it is.
"""

import contextlib

import apsw

from trilogue.stores.sqlite import SqliteConnection, connect

CHECKPOINT_MS = 1_000  # nobody else writes meanwhile


def rewrite(connection: SqliteConnection) -> bool:
    """Write the file anew and empty its log, while nobody else writes; False while a reader keeps old pages in the log.

    Takes about a second for 100 MB, and twice as much room: beside the file and in the folder for temporary files. Raises apsw
    errors.
    """
    with connection.alone(), contextlib.closing(connect(connection.path)) as own:
        names = [str(name) for (name,) in own.execute("select name from sqlite_master where type = 'table'").fetchall()]
        if not all(name.startswith(("trilogue_", "sqlite_")) for name in names):
            own.pragma("temp_store", 1)  # on disk: the whole file would not fit into memory
            own.execute("vacuum").fetchall()
        own.set_busy_timeout(CHECKPOINT_MS)
        try:
            is_busy = own.execute("pragma wal_checkpoint(truncate)").fetchall()[0][0]
        except apsw.BusyError:
            return False
        return not is_busy
