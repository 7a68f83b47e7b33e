"""Notification Service: tells friends who watches what, and users what is new for them.

    video.watch_started      ──> each friend:  "ana started watching The Quiet Harbour"
    recommendation.updated   ──> the user:     "new recommendations: …"

Friends are neighbours on a ring: users stand at a hash of their name, and the two before and the two after are friends. That is
symmetric, the same for the same seed, and needs no table of pairs. Nobody gets more than three notifications in an hour
(of event time); the rest is counted and not sent.
"""

from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import RecommendationUpdated, WatchStarted, as_us

SEED = b"friends"
EACH_SIDE = 2
PER_HOUR = 3
HOUR_US = 3_600_000_000

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    db.execute("create table if not exists notification_handled (watch text primary key) without rowid")
    db.execute("create table if not exists notification_users (place integer primary key, user text not null)")
    db.execute(
        "create table if not exists notification_rate "
        "(user text, hour integer, sent integer, primary key (user, hour)) without rowid"
    )
    db.execute("create table if not exists notification_sent (user text, at_us integer, text text)")
    db.execute("create table if not exists notification_totals (what text primary key, n integer not null) without rowid")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    for name in ("handled", "users", "rate", "sent", "totals"):
        db.execute(f"delete from notification_{name}")


@dataclass(slots=True)
class Outbox:
    """What one batch sends. sent_in: how many a user got in an hour, as far as the batch has looked."""

    db: Db
    sent_in: dict[tuple[str, int], int] = field(default_factory=dict)
    letters: list[tuple[str, int, str]] = field(default_factory=list)
    held_back: int = 0

    def send(self, user: str, at: datetime, text: str) -> None:
        """Send, or count as held back."""
        at_us = as_us(at)
        hour = at_us // HOUR_US
        sent = self.sent_in.get((user, hour))
        if sent is None:
            rows = self.db.execute("select sent from notification_rate where user = ? and hour = ?", (user, hour))
            sent = rows[0][0] if rows else 0
        if sent >= PER_HOUR:
            self.sent_in[user, hour] = sent
            self.held_back += 1
            return
        self.sent_in[user, hour] = sent + 1
        self.letters.append((user, at_us, text))

    def save(self) -> None:
        """Write down what was sent."""
        self.db.executemany("insert into notification_sent values (?, ?, ?)", self.letters)
        rates = [(user, hour, sent) for (user, hour), sent in self.sent_in.items()]
        self.db.executemany("insert or replace into notification_rate values (?, ?, ?)", rates)
        self.db.executemany(
            "insert into notification_totals values (?, ?) on conflict do update set n = n + excluded.n",
            [("sent", len(self.letters)), ("held back", self.held_back)],
        )


@router.on(group="notification", retry=Retry(25, "20ms..1s"), batch=500, start="beginning", reset=reset)
def notify(events: list[WatchStarted | RecommendationUpdated], db: Db) -> None:
    """Tell friends of watches, and users of new recommendations."""
    watches = [e for e in events if isinstance(e, WatchStarted)]
    db.executemany("insert into notification_handled (watch) values (?)", [(w.session,) for w in watches])
    users = {w.user for w in watches}
    db.executemany("insert or ignore into notification_users values (?, ?)", [(place(user), user) for user in sorted(users)])
    friends = {user: friends_of(db, user) for user in users}
    outbox = Outbox(db)
    for e in events:
        if isinstance(e, RecommendationUpdated):
            outbox.send(e.user, e.updated_at, f"new recommendations: {', '.join(e.titles[:3])}")
            continue
        for friend in friends[e.user]:
            outbox.send(friend, e.watched_at, f"{e.user} started watching {e.title}")
    outbox.save()


def place(user: str) -> int:
    """Where on the ring a user stands."""
    return int.from_bytes(blake2b(user.encode(), key=SEED, digest_size=8).digest(), "big", signed=True)


def friends_of(db: Db, user: str) -> list[str]:
    """The neighbours of a user on the ring, among the users known so far."""
    here = place(user)
    after = db.execute("select user from notification_users where place > ? order by place limit ?", (here, EACH_SIDE))
    before = db.execute("select user from notification_users where place < ? order by place desc limit ?", (here, EACH_SIDE))
    # The ring closes: who stands near its end looks on at the other one.
    if len(after) < EACH_SIDE:
        after += db.execute("select user from notification_users order by place limit ?", (EACH_SIDE - len(after),))
    if len(before) < EACH_SIDE:
        before += db.execute("select user from notification_users order by place desc limit ?", (EACH_SIDE - len(before),))
    return [name for name in dict.fromkeys(name for (name,) in before + after) if name != user]
