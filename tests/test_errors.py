"""The error tree: what is drawn is what there is."""

import inspect
import re

import trilogue
from trilogue import errors
from trilogue.errors import LogError, OutcomeUnknown, TrilogueError


def drawn() -> dict[str, str | None]:
    """Each class of the picture, with the class it hangs from."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([ │├└─]*)([A-Z]\w+)(?:  |$)", line)
        if found is None:
            continue
        column = len(found[1])
        above = [(at, name) for at, name in above if at < column]
        parents[found[2]] = above[-1][1] if above else None
        above.append((column, found[2]))
    return parents


def classes() -> dict[str, type]:
    return {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, TrilogueError)}


def test_the_picture_is_the_tree() -> None:
    there = {name: cls.__bases__[0].__name__ for name, cls in classes().items()}
    picture = drawn()
    assert picture.pop("TrilogueError") is None
    assert there.pop("TrilogueError") == "Exception"
    assert picture == there


def test_all_are_public_and_documented() -> None:
    for name, cls in classes().items():
        assert getattr(trilogue, name) is cls
        assert cls.__doc__


def test_stored_is_said_as_drawn() -> None:
    for line in (errors.__doc__ or "").splitlines():
        if found := re.search(r"(\w+) +stored=(False|None):", line):
            assert str(classes()[found[1]].stored) == found[2], found[1]  # type: ignore[attr-defined]
    assert LogError.stored is False
    assert OutcomeUnknown.stored is None


def test_verdicts_keep_what_they_say() -> None:
    assert errors.Later("10m").after == "10m"
    assert "10m" in str(errors.Later("10m"))
    assert errors.Reject("no such user").reason == "no such user"
    assert str(errors.Reject("no such user")) == "no such user"


def test_no_verdict_is_caught_with_the_log_errors() -> None:
    for verdict in (errors.Later, errors.Reject):
        assert not issubclass(verdict, (LogError, errors.WiringError))
