"""Which topic an event goes to, and which ones a group reads. Pure.

    video.watched            video-events      the first word of the type
    video.heartbeat          video-heartbeat   @event("video.heartbeat", topic="video-heartbeat")
    group on "video.*"       both              filtered by pattern after reading
    group on "#"             every topic there that some type goes to

A group has two topics of its own, in direct mode: GROUP.dead holds its dead letters, GROUP.redrive what is given back to it.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from trilogue.errors import BadOption
from trilogue.patterns import is_wild, matches

EVENTS = "-events"
DEAD = ".dead"
REDRIVE = ".redrive"
TOPIC_CHARS = 249
_TOPIC = re.compile(r"[A-Za-z0-9._-]+")
_OTHER = re.compile(r"[^A-Za-z0-9._-]")


@lru_cache(maxsize=4_096)
def topic_by_rule(event_type: str) -> str:
    """The topic of a type that names none."""
    return checked(event_type.partition(".")[0] + EVENTS)


def topic_of(event_type: str, declared: Mapping[str, str]) -> str:
    """The topic of a type, without a prefix. declared: topics by type, of those types that name one."""
    named = declared.get(event_type)
    return topic_by_rule(event_type) if named is None else checked(named)


@lru_cache(maxsize=4_096)
def checked(topic: str) -> str:
    """The name itself if Kafka allows it; raises BadOption otherwise."""
    if _TOPIC.fullmatch(topic) and len(topic) <= TOPIC_CHARS - len(REDRIVE) and topic not in (".", ".."):
        return topic
    raise BadOption(f"topic {topic!r} is not allowed: expected letters, digits, '.', '_' and '-', at most {TOPIC_CHARS} of them")


def needed(patterns: Iterable[str], declared: Mapping[str, str]) -> set[str]:
    """The topics that patterns name by themselves, there or not."""
    return {topic for pattern in patterns for topic in _needed(pattern, declared)}


def _needed(pattern: str, declared: Mapping[str, str]) -> set[str]:
    if not is_wild(pattern):
        return {topic_of(pattern, declared)}
    if pattern[0] in "*#":
        return set()
    # One that names a topic is read where it is; there may be others of the same first word that follow the rule.
    return {topic_by_rule(pattern)} | {checked(topic) for name, topic in declared.items() if matches(pattern, name)}


def is_open(patterns: Iterable[str]) -> bool:
    """Whether topics that nobody has named may belong to these patterns."""
    return any(pattern[0] in "*#" for pattern in patterns)


def also(patterns: Iterable[str], declared: Mapping[str, str], there: Collection[str]) -> set[str]:
    """The topics, of those that are there, that open patterns read beside the ones they need."""
    if not is_open(patterns):
        return set()
    return {topic for topic in there if topic.endswith(EVENTS)} | {topic for topic in declared.values() if topic in there}


def dead_topic(group: str) -> str:
    """Where dead letters of a group go."""
    return checked(_spelled(group) + DEAD)


def redrive_topic(group: str) -> str:
    """Where what is given back to a group alone goes."""
    return checked(_spelled(group) + REDRIVE)


def _spelled(group: str) -> str:
    return _OTHER.sub(lambda letter: f"_{ord(letter[0]):x}", group)
