"""What a kafka:// URL says, and which topics events and groups go to."""

from pathlib import Path

import pytest

from trilogue.brokers.kafka import topics
from trilogue.brokers.kafka.settings import read
from trilogue.errors import BadOption, TwiceNamed
from trilogue.events import event, named_topics

DECLARED = {"video.heartbeat": "video-heartbeat", "mail.sent": "letters"}


def test_the_chapters_url() -> None:
    settings = read("kafka://h1,h2:9093?linger=10ms&batch_bytes=16384&retries=3")
    config = settings.producer()
    assert config["bootstrap.servers"] == "h1:9092,h2:9093"
    assert (config["linger.ms"], config["batch.size"], config["message.send.max.retries"]) == (10, 16_384, 3)
    assert config["acks"] == "all"
    assert config["enable.idempotence"] is True
    assert config["partitioner"] == "murmur2_random"


def test_what_a_member_is_told() -> None:
    config = read("kafka://h").consumer("g")
    assert config["enable.auto.commit"] is False
    assert config["enable.auto.offset.store"] is False
    assert config["auto.offset.reset"] == "error"
    assert config["partition.assignment.strategy"] == "cooperative-sticky"
    assert config["allow.auto.create.topics"] is False
    assert "partition.assignment.strategy" not in read("kafka://h?protocol=consumer").consumer("g")


def test_users_and_tls(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("")
    config = read(f"kafka+ssl://ann:s%40cret@h?mechanism=SCRAM-SHA-512&ca={ca}").producer()
    assert config["security.protocol"] == "SASL_SSL"
    assert (config["sasl.mechanism"], config["sasl.username"], config["sasl.password"]) == ("SCRAM-SHA-512", "ann", "s@cret")
    assert config["ssl.ca.location"] == str(ca)
    assert "ssl.endpoint.identification.algorithm" not in config  # the server's name is looked at: that is the default
    assert read("kafka://ann:secret@h").producer()["security.protocol"] == "SASL_PLAINTEXT"
    assert "secret" not in read("kafka://ann:secret@h").shown


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("kafka://h/topic", "prefix"),
        ("kafka://h:port", "h:port"),
        ("kafka://", "server"),
        ("kafka://h?linger=10", "duration"),
        ("kafka://h?partitions=0", "1 to"),
        ("kafka://h?protocol=new", "classic or consumer"),
        ("kafka://h?pre fix=x", "unknown option"),
        ("kafka://h?prefix=a/b", "letters"),
        ("kafka://h?ca=/nowhere", "a file"),
        ("kafka+ssl://h?cert=pyproject.toml", "belong together"),
        ("kafka://h?mechanism=PLAIN", "user and password"),
    ],
)
def test_what_is_wrong_is_said(url: str, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        read(url)


def test_tls_files_need_tls(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("")
    with pytest.raises(BadOption, match=r"kafka\+ssl://"):
        read(f"kafka://h?ca={tmp_path}/ca")


# ── topics ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_topic_of_a_type() -> None:
    assert topics.topic_of("video.watched", DECLARED) == "video-events"
    assert topics.topic_of("video.heartbeat", DECLARED) == "video-heartbeat"
    assert topics.topic_of("alone", {}) == "alone-events"


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["video.watched"], {"video-events"}),
        (["video.heartbeat"], {"video-heartbeat"}),
        (["video.*"], {"video-events", "video-heartbeat"}),
        (["video.watched", "mail.sent"], {"video-events", "letters"}),
        (["#"], set()),
        (["*.sent"], set()),
    ],
)
def test_the_topics_patterns_name(patterns: list[str], named: set[str]) -> None:
    assert topics.needed(patterns, DECLARED) == named


def test_open_patterns_read_what_is_there() -> None:
    there = ["video-events", "letters", "g.dead", "g.redrive", "other"]
    assert topics.also(["#"], DECLARED, there) == {"video-events", "letters"}
    assert topics.also(["video.*"], DECLARED, there) == set()


def test_groups_spell_their_own_topics() -> None:
    assert topics.dead_topic("video.badge") == "video.badge.dead"
    assert topics.redrive_topic("process:transfer") == "process_3atransfer.redrive"
    with pytest.raises(BadOption, match="at most"):
        topics.dead_topic("x" * 300)


def test_a_topic_that_kafka_refuses_is_refused() -> None:
    with pytest.raises(BadOption, match="not allowed"):
        topics.topic_of("a.b", {"a.b": "no topic"})


def test_a_type_goes_to_one_topic() -> None:
    event("kafka.settings.once", topic="here")
    event("kafka.settings.once", topic="here")
    assert named_topics()["kafka.settings.once"] == "here"
    with pytest.raises(TwiceNamed, match="one topic"):
        event("kafka.settings.once", topic="there")
