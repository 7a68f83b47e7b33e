"""Notification Service: tells friends who watches what, and users what is new for them.

    video.watch_started      ──> each friend:  "ana started watching The Quiet Harbour"
    recommendation.updated   ──> the user:     "new recommendations: …"

Friends are neighbours on a ring: users stand at a hash of their name, and the two before and the two after are friends. That is
symmetric, the same for the same seed, and needs no table of pairs. Nobody gets more than three notifications in an hour
(of event time); the rest is counted and not sent.
"""

from collections.abc import Sequence
from hashlib import blake2b
from operator import itemgetter

from trilogue import Db, Retry, Router
from trilogue.apps.video.events import RecommendationUpdated, WatchStarted, as_us
from trilogue.apps.video.handled import create_handled, create_turn, forget_handled, fresh, fresh_ids, take_turn

SEED = b"friends"
EACH_SIDE = 2
PER_HOUR = 3
HOUR_US = 3_600_000_000
Letter = tuple[str, int, str]  # to whom, when (microseconds since 1970), what

router = Router()


@router.setup
def tables(db: Db) -> None:
    """The read model, and which watches are in it."""
    create_handled(db, "notification")
    create_handled(db, "notification_news")
    create_turn(db, "notification")
    db.execute('create table if not exists notification_users (place bigint primary key, "user" text not null)')
    db.execute('create table if not exists notification_rate ("user" text, hour bigint, sent bigint, primary key ("user", hour))')
    db.execute('create table if not exists notification_sent ("user" text, at_us bigint, text text)')
    db.execute("create table if not exists notification_totals (what text primary key, n bigint not null)")


def reset(db: Db) -> None:
    """Forget everything, before a replay."""
    forget_handled(db, "notification")
    forget_handled(db, "notification_news")
    for name in ("users", "rate", "sent", "totals"):
        db.execute(f"delete from notification_{name}")


@router.on(group="notification", retry=Retry(25, "20ms..1s"), batch=500, db_limit="2s", reset=reset)
def notify(events: list[WatchStarted | RecommendationUpdated], db: Db) -> None:
    """Tell friends of watches, and users of new recommendations."""
    take_turn(db, "notification")
    watches = fresh(db, "notification", [e for e in events if isinstance(e, WatchStarted)])
    news = _fresh_news(db, [e for e in events if isinstance(e, RecommendationUpdated)])
    users = sorted({w.user for w in watches})
    db.executemany("insert into notification_users values (?, ?) on conflict do nothing", [(place(user), user) for user in users])
    friends = {user: friends_of(db, user) for user in users}
    send(
        db,
        [
            *((friend, w.watched_us, f"{w.user} started watching {w.title}") for w in watches for friend in friends[w.user]),
            *((e.user, as_us(e.updated_at), f"new recommendations: {', '.join(e.titles[:3])}") for e in news),
        ],
    )


def _fresh_news(db: Db, news: list[RecommendationUpdated]) -> list[RecommendationUpdated]:
    new = fresh_ids(db, "notification_news", [f"{e.user} {as_us(e.updated_at)}" for e in news])
    return [news[n] for n in new]


def send(db: Db, letters: Sequence[Letter]) -> None:
    """Send letters, or count as held back those that are too many."""
    sent_in = _sent_in(db, sorted({(user, at_us // HOUR_US) for user, at_us, _ in letters}))
    going: list[Letter] = []
    for letter in sorted(letters, key=itemgetter(1)):
        hour = letter[0], letter[1] // HOUR_US
        if sent_in[hour] < PER_HOUR:
            sent_in[hour] += 1
            going.append(letter)
    db.executemany("insert into notification_sent values (?, ?, ?)", going)
    db.executemany(
        'insert into notification_rate values (?, ?, ?) on conflict ("user", hour) do update set sent = excluded.sent',
        [(user, hour, sent) for (user, hour), sent in sent_in.items()],
    )
    db.executemany(
        "insert into notification_totals values (?, ?) on conflict (what) do update set n = notification_totals.n + excluded.n",
        [("sent", len(going)), ("held back", len(letters) - len(going))],
    )


def _sent_in(db: Db, hours: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """How many notifications users got in some hours."""
    sent = dict.fromkeys(hours, 0)
    rows, values = ", ".join(["(?, ?)"] * len(hours)), [value for hour in hours for value in hour]
    select = 'select "user", hour, sent from notification_rate where ("user", hour) in'
    found = db.execute(f"{select} (values {rows})", values) if hours else []
    return sent | {(user, hour): count for user, hour, count in found}


def place(user: str) -> int:
    """Where on the ring a user stands."""
    return int.from_bytes(blake2b(user.encode(), key=SEED, digest_size=8).digest(), "big", signed=True)


def friends_of(db: Db, user: str) -> list[str]:
    """The neighbours of a user on the ring, among the users known so far."""
    here = place(user)
    after = db.execute('select "user" from notification_users where place > ? order by place limit ?', (here, EACH_SIDE))
    before = db.execute('select "user" from notification_users where place < ? order by place desc limit ?', (here, EACH_SIDE))
    # The ring closes: who stands near its end looks on at the other one.
    if len(after) < EACH_SIDE:
        after += db.execute('select "user" from notification_users order by place limit ?', (EACH_SIDE - len(after),))
    if len(before) < EACH_SIDE:
        before += db.execute('select "user" from notification_users order by place desc limit ?', (EACH_SIDE - len(before),))
    return [name for name in dict.fromkeys(name for (name,) in before + after) if name != user]
