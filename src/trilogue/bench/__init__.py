"""Our own figures beside the limit and a peer, on any URL: `trilogue bench`.

place.py    a log nobody else uses            report.py       all figures in turn, round by round, as ratios
suites.py   what is measured on which URL     environment.py  what it was measured with
events.py   the events                        measured.py     one measurement;  durable.py: how durable it was

              ours                 the limit: the raw driver       the peer, through its public API
sqlite        figures.py           raw_apsw.py                     huey_sqlite.py
              store_figures.py     raw_apsw_store.py               eventsourcing_sqlite.py
postgresql    both                 raw_psycopg.py                  eventsourcing_postgresql.py
amqp          figures.py           raw_pika.py                     faststream_rabbit.py
kafka         figures.py           raw_kafka.py                    faststream_kafka.py

scale.py      whether anything grows with the log;  waiting.py: the memory of a worker
"""
