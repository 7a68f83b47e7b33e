"""What handlers answered, sorted by what has to be done for it. Pure.

done ─▶ acknowledge     stored, held ─▶ the store     back ─▶ the broker     lost ─▶ nothing: it is somebody else's
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trilogue.events import Delivery, InTransaction, Receipt, Settlement
from trilogue.outcomes import Answer
from trilogue.relay import Outcome, is_refused


@dataclass(slots=True)
class Answers:
    """Answers by what has to be done for them. done: in order, with what they emit; the others' keys are free already."""

    done: list[Settlement] = field(default_factory=list)
    emits: bool = False
    stored: list[Answer] = field(default_factory=list)
    held: list[Answer] = field(default_factory=list)
    back: list[Delivery] = field(default_factory=list)
    lost: list[Delivery] = field(default_factory=list)


def deliveries_of(answer: Answer) -> Sequence[Delivery]:
    """The deliveries an answer is for."""
    return (answer.delivery,) if isinstance(answer, Settlement) else answer.deliveries


def dead_of(delivery: Delivery, outcomes: Sequence[Outcome]) -> Settlement:
    """A dead letter, of a record whose handler published what is refused for good."""
    error = next(outcome for outcome in outcomes if is_refused(outcome))
    return Settlement(delivery, "dead", error=f"what its handler published is refused: {error}")


def after_publish(answer: Answer, outcomes: Sequence[Outcome]) -> Answer:
    """The answer to a held record, once what it emitted is published, or is not."""
    if isinstance(answer, InTransaction) or not outcomes:
        return answer
    if any(map(is_refused, outcomes)):
        return dead_of(answer.delivery, outcomes)
    if not all(isinstance(outcome, Receipt) for outcome in outcomes):
        return Settlement(answer.delivery, "release")
    return Settlement(answer.delivery)
