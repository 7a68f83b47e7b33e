"""Kafka as a broker.

    publish ──▶ producer.py ══ topics ══▶ member.py ──▶ receive          one Member (consumer + its thread) per group
                wire.py                    lane.py  ◀── acknowledge      one Lane per partition that is ours
                catalog.py topics.py       places.py, admin.py           where groups begin, what is there

    settings.py   what the URL says         dead.py   dead letters, for direct mode

Order is that of a partition, and equal keys are in one partition. A group's place is its committed offset, with what is finished
above it in the commit's metadata, or for a group with effects what a store says (Cursors).
"""

from trilogue.brokers.kafka.broker import Kafka


def open_broker(url: str) -> Kafka:
    """The broker behind a kafka:// or kafka+ssl:// URL, not connected yet; raises BadOption."""
    return Kafka(url)
