"""What is watched by the same people soon after one another: an item-to-item model that learns from every watch.

    title   neighbours: other titles, each with how often and how closely they were watched together    at most 100
    user    recent:     the last 5 titles                                                               5
            wants:      titles with a weight; at each watch all weights fade to 70 %, then the          at most 100
                        watched title's neighbours are added, each divided by watches ^ 0.8

A user's recommendations are the ten largest wants not seen yet, filled up with what is popular. One watch costs one look at one
title's neighbours, however long the user's history is. All of it is pure: plain values in, plain values out.
"""

from collections.abc import Iterable, MutableMapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import itemgetter

NEIGHBOURS = 100
RECENT = 5
WANTS = 100
FADE = 0.7
POPULARITY_POWER = 0.8
TOP = 10

Weights = dict[str, float]


@dataclass(slots=True)
class Title:
    """What is known of a title."""

    title: str = ""
    watches: int = 0
    neighbours: Weights = field(default_factory=dict)


@dataclass(slots=True)
class Viewer:
    """What is known of a user. shown, popular: the titles last recommended by the model, and by popularity alone.

    announced: the recommendations of the last recommendation.updated, and when that was (microseconds since 1970).
    """

    recent: list[str] = field(default_factory=list)
    wants: Weights = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    popular: list[str] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    announced_us: int = 0


def learn(titles: MutableMapping[str, Title], recent: Iterable[str], video: str) -> None:
    """Bring a title and those watched before it nearer to each other, the latest most.

    recent: the user's titles before this one, the latest last. titles: has an entry for each of them.
    """
    mine = titles[video].neighbours
    for age, before in enumerate(reversed(list(recent)), 1):
        if before == video:
            continue
        closeness = age**-0.5
        theirs = titles[before].neighbours
        mine[before] = mine.get(before, 0.0) + closeness
        theirs[video] = theirs.get(video, 0.0) + closeness
        _keep_largest(theirs)
    _keep_largest(mine)
    titles[video].watches += 1


def want(wants: Weights, watched: Title, seen: AbstractSet[str]) -> Weights:
    """A user's wants after a watch, the largest first.

    seen: what the user has seen, the watched title included.
    """
    new = {video: weight * FADE for video, weight in wants.items() if video not in seen}
    share = watched.watches**-POPULARITY_POWER
    for video, weight in watched.neighbours.items():
        if video not in seen:
            new[video] = new.get(video, 0.0) + weight * share
    return _largest(new, WANTS)


def _keep_largest(weights: Weights) -> None:
    """Once there are too many, keep the largest three quarters, so that it is seldom done."""
    if len(weights) > NEIGHBOURS:
        kept = _largest(weights, NEIGHBOURS * 3 // 4)
        weights.clear()
        weights.update(kept)


def _largest(weights: Weights, limit: int) -> Weights:
    return dict(sorted(weights.items(), key=itemgetter(1), reverse=True)[:limit])


def best(wants: Weights, popular: list[str]) -> list[str]:
    """The ten to recommend: the largest wants, filled up with popular ones.

    wants: the largest first, as want() leaves them.
    """
    return list(islice(dict.fromkeys(chain(islice(wants, TOP), popular)), TOP))
