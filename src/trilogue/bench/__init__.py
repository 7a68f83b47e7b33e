"""Our own figures beside the limit and a peer: `trilogue bench`.

figures.py   what trilogue does: publish, consume, latency
limits.py    raw apsw doing the same durable work: the most that SQLite allows
peers.py     huey on SQLite with fsync, the best-known Python queue on the same file format
report.py    all of them in turn, round by round, as ratios
"""
