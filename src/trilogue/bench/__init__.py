"""Our own figures beside the limit and a peer: `trilogue bench`.

figures.py   what trilogue does: publish, consume, latency             store_figures.py   the same of the event store side
limits.py    raw apsw doing the same durable work: all SQLite allows   store_limits.py
peers.py     huey on SQLite with fsync, the best-known Python queue    store_peers.py     eventsourcing on SQLite
report.py    all of them in turn, round by round, as ratios            measured.py        one measurement
scale.py     whether anything grows with the log                       waiting.py         the memory of a worker
"""
