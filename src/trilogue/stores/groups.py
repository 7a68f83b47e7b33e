"""Groups by name: declare, find, set to another place, pause, forget.

trilogue_groups   name, patterns, epoch, revision       revision: workers look again when it grows
trilogue_slots    64 per group: cursor, epoch, owner
trilogue_held     state: 0 ready (from due on), 1 parked, 2 dead
"""

from collections.abc import Callable, Sequence

import msgspec

from trilogue.errors import TwiceNamed, UnknownEvent, Unsupported
from trilogue.events import Group
from trilogue.ports import SLOTS, Db, SeekTo
from trilogue.stores.dialect import Sql, alone
from trilogue.stores.log import newest, oldest, position_at, unpack

READY, PARKED, DEAD = 0, 1, 2
OF_A_BROKERS_GROUP = ("lane", "seen", "replay")  # what else is kept of one, as inbox.py says


def bind(sql: Sql, groups: Sequence[Group], now_us: int, *, work: bool) -> None:
    """Declare groups; a known one keeps its cursor, and what it reads unless whoever binds it is to work for it."""
    alone(sql)  # two that find a group missing must not both make it
    for group in groups:
        there = sql.rows("select id, app, patterns, ordered, has_effects from trilogue_groups where name = ?", (group.name,))
        if there:
            _check_log(sql, there[0][0], group)
        if not there and group.start == "existing":
            continue
        if not there:
            create(sql, group, newest(sql)[0] if group.start == "now" else oldest(sql) - 1, now_us)
        elif work and there[0][1:] != (group.app, *definition(group)):
            _redefine(sql, group, *there[0])


def definition(group: Group) -> tuple[str, bool, bool]:
    """What all who work for a group must agree on: its patterns, whether it is ordered, whether it has effects."""
    return msgspec.json.encode(group.patterns).decode(), group.ordered, group.has_effects


def _redefine(sql: Sql, group: Group, group_id: int, _app: str, *before: object) -> None:
    """The newest program decides. Those that read anything else are fenced off: they would pass over what only it reads."""
    update = (
        "update trilogue_groups set app = ?, patterns = ?, ordered = ?, has_effects = ?, revision = revision + 1 where id = ?"
    )
    sql.rows(update, (group.app, *definition(group), group_id))
    if tuple(before) == definition(group):
        return
    sql.rows("update trilogue_slots set epoch = epoch + 1, owner = null where group_id = ?", (group_id,))
    sql.rows("update trilogue_groups set epoch = epoch + 1 where id = ?", (group_id,))
    if before[1] != group.ordered:
        _reorder(sql, group_id, ordered=group.ordered)


def _check_log(sql: Sql, group_id: int, group: Group) -> None:
    """A group reads the log of this store or a broker's: its positions would mean two things."""
    is_inbox = sql.rows("select inbox from trilogue_groups where id = ?", (group_id,))[0][0] is not None
    if is_inbox != group.inbox:
        now, was = (
            ("a broker", "this store itself") if group.inbox else ("this store", "a broker, beside which this store stands")
        )
        raise Unsupported(
            f"group {group.name!r} is to read the log of {now}, and has read that of {was}: give the App the URL it had, give "
            f"the handler another group=, or forget what it did with `trilogue groups drop {group.name}`"
        )


def _reorder(sql: Sql, group_id: int, *, ordered: bool) -> None:
    """Held rows carry a key exactly where order matters."""
    key = "(select r.key from trilogue_records r where r.position = trilogue_held.position)" if ordered else "null"
    sql.rows(f"update trilogue_held set key = {key} where group_id = ?", (group_id,))
    if ordered:
        bodies = sql.rows("select position, record from trilogue_held where group_id = ? and record is not null", (group_id,))
        keys = [(unpack(body, position).key, group_id, position) for position, body in bodies]
        sql.many("update trilogue_held set key = ? where group_id = ? and position = ?", keys)


def create(sql: Sql, group: Group, cursor: int, now_us: int) -> None:
    """A new group whose slots all stand at one cursor."""
    sql.rows(
        "insert into trilogue_groups (name, app, patterns, ordered, has_effects, bound_us, inbox) values (?, ?, ?, ?, ?, ?, ?)",
        (group.name, group.app, *definition(group), now_us, 0 if group.inbox else None),
    )
    group_id = group_id_of(sql, group.name)
    sql.many(
        "insert into trilogue_slots (group_id, slot, cursor) values (?, ?, ?)",
        [(group_id, s, cursor) for s in range(SLOTS)],
    )


def start(sql: Sql, group: Group, after: int, now_us: int, *, instead_of: str | None, paused: bool) -> None:
    """A new group that reads after a position. instead_of: a group that goes; up to where that one was, this one is quiet."""
    create(sql, group, after, now_us)
    if instead_of is not None:
        sql.rows(
            "update trilogue_slots set quiet_to = o.reached from (select slot as n, "
            "case when cursor < quiet_to then quiet_to else cursor end as reached from trilogue_slots where group_id = ?) o "
            "where group_id = ? and slot = o.n and o.reached > cursor",
            (group_id_of(sql, instead_of), group_id_of(sql, group.name)),
        )
        drop(sql, instead_of)
    set_paused(sql, group.name, paused)


def held(sql: Sql, name: str) -> tuple[int, int] | None:
    """How many records of a group are held ready and how many parked; None if there is no such group."""
    known = sql.rows("select id from trilogue_groups where name = ?", (name,))
    if not known:
        return None
    count = f"select count(*) filter (where state = {READY}), count(*) filter (where state = {PARKED}) from trilogue_held"
    ready, parked = sql.rows(f"{count} where group_id = ?", known[0])[0]
    return ready, parked


def drop_held(sql: Sql, name: str, position: int) -> None:
    """Forget that a group gave up on a record; a parked key goes on."""
    group_id = group_id_of(sql, name)
    given_up = f"group_id = ? and position = ? and state in ({PARKED}, {DEAD})"
    sql.rows(f"delete from trilogue_held where {given_up}", (group_id, position))
    sql.rows("update trilogue_groups set revision = revision + 1 where id = ?", (group_id,))


def group_id_of(sql: Sql, name: str) -> int:
    """The number of a group; raises UnknownEvent naming those there are."""
    rows = sql.rows("select id from trilogue_groups where name = ?", (name,))
    if rows:
        return int(rows[0][0])
    names = [row[0] for row in sql.rows("select name from trilogue_groups order by name limit 50")]
    raise UnknownEvent(f"there is no group {name!r}; this log has {', '.join(names) or 'none yet'}")


def seek(
    sql: Sql,
    name: str,
    to: SeekTo,
    *,
    into: str | None,
    emits: bool,
    reset: Callable[[Db], None] | None,
    db: Db,
    now_us: int,
) -> int:
    """Set a group, or a new one with its patterns, to start after the returned position."""
    group_id = group_id_of(sql, name)
    cursor = _cursor_for(sql, to)
    app, patterns, ordered, has_effects = sql.rows(
        "select app, patterns, ordered, has_effects from trilogue_groups where id = ?", (group_id,)
    )[0]
    if into is not None:
        if sql.rows("select 1 from trilogue_groups where name = ?", (into,)):
            raise Unsupported(f"group {into!r} exists already: replay into a name that is new")
        create(
            sql,
            Group(into, tuple(msgspec.json.decode(patterns)), bool(ordered), has_effects=bool(has_effects), app=app),
            cursor,
            now_us,
        )
        return cursor
    if has_effects and reset is None:
        raise Unsupported(
            f"group {name!r} writes through `db`: replaying it in place would apply every effect twice; give its handler reset= "
            "and name the app (--app MODULE:APP), or replay into a new group"
        )
    if reset is not None:
        reset(db)
    quiet = "0" if emits else "case when cursor < quiet_to then quiet_to else cursor end"
    sql.rows(
        f"update trilogue_slots set epoch = epoch + 1, quiet_to = {quiet}, cursor = ? where group_id = ?",
        (cursor, group_id),
    )
    sql.rows("delete from trilogue_held where group_id = ?", (group_id,))
    sql.rows("update trilogue_groups set epoch = epoch + 1, revision = revision + 1 where id = ?", (group_id,))
    return cursor


def _cursor_for(sql: Sql, to: SeekTo) -> int:
    head = newest(sql)[0]
    if to.end == "now":
        return head
    if to.end == "beginning":
        return oldest(sql) - 1
    if to.time_us is not None:
        return position_at(sql, to.time_us) - 1
    if to.position is None or not oldest(sql) <= to.position <= head + 1:
        raise Unsupported(f"position {to.position} is not on the log: it holds {oldest(sql)} to {head}")
    return to.position - 1


def set_paused(sql: Sql, name: str, paused: bool) -> None:
    """Pause or resume a group."""
    sql.rows("update trilogue_groups set paused = ?, revision = revision + 1 where id = ?", (paused, group_id_of(sql, name)))


def drop(sql: Sql, name: str) -> None:
    """Forget a group."""
    group_id = group_id_of(sql, name)
    for table in ("held", "slots", "members"):
        sql.rows(f"delete from trilogue_{table} where group_id = ?", (group_id,))
    sql.rows("delete from trilogue_state where owner in (?, ?, ?)", tuple(f"{what}:{name}" for what in OF_A_BROKERS_GROUP))
    sql.rows("delete from trilogue_groups where id = ?", (group_id,))


def rename(sql: Sql, name: str, new: str) -> None:
    """Give a group another name; whoever works for the old one is fenced off."""
    group_id = group_id_of(sql, name)
    if sql.rows("select 1 from trilogue_groups where name = ?", (new,)):
        raise TwiceNamed(f"there is a group {new!r} already: drop it first (`trilogue groups drop {new}`), or take another name")
    sql.rows("delete from trilogue_members where group_id = ?", (group_id,))
    sql.rows("update trilogue_slots set epoch = epoch + 1, owner = null where group_id = ?", (group_id,))
    sql.rows(
        "update trilogue_groups set name = ?, epoch = epoch + 1, revision = revision + 1 where id = ?",
        (new, group_id),
    )


def revisions(sql: Sql) -> dict[str, int]:
    """The revision of every group."""
    return dict(sql.rows("select name, revision from trilogue_groups"))
