"""Acknowledgements as a model of the server sees them: exactly what is finished, and never a tag it does not know."""

from hypothesis import given
from hypothesis import strategies as st

from trilogue.brokers.rabbitmq.acks import Acks


class Server:
    """What RabbitMQ keeps of a channel: the tags that are out. A tag it does not know closes the channel."""

    def __init__(self) -> None:
        self.out: list[int] = []

    def ack(self, tag: int, *, multiple: bool) -> None:
        assert tag in self.out, f"the channel is closed: unknown delivery tag {tag}"
        self.out = [one for one in self.out if one > tag] if multiple else [one for one in self.out if one != tag]


@given(st.lists(st.one_of(st.integers(1, 8), st.lists(st.integers(1, 60), max_size=12)), max_size=60))
def test_the_server_and_we_agree_about_what_is_out(steps: list[int | list[int]]) -> None:
    acks, server, finished = Acks(), Server(), set[int]()
    for step in steps:
        if isinstance(step, int):
            server.out += range(acks.last + 1, acks.last + 1 + step)
            acks.last += step
            continue
        finished |= {tag for tag in step if tag <= acks.last}
        prefix, beyond = acks.finish(step)
        if prefix:
            server.ack(prefix, multiple=True)
        for tag in beyond:
            server.ack(tag, multiple=False)
        assert server.out == [tag for tag in range(1, acks.last + 1) if tag not in finished]
        assert acks.out == len(server.out)
        assert [tag for tag in range(1, acks.last + 2) if acks.is_out(tag)] == server.out


def test_a_finished_prefix_is_one_acknowledgement() -> None:
    acks = Acks()
    acks.last = 8
    assert acks.finish([1, 2, 3, 5]) == (3, [5])
    assert acks.finish([4, 6, 8]) == (6, [8])
    assert acks.finish([5]) == (0, [])
    assert acks.out == 1


def test_what_is_remembered_does_not_grow() -> None:
    acks = Acks()
    for tag in range(1, 10_001):
        acks.last = tag
        acks.finish([tag])
    assert acks.out == 0
    assert acks._done == set()
