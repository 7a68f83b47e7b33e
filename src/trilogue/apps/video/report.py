"""What became of all the watches: read from the log and the services' tables, shown to people or programs.

{"log": "sqlite:///…", "watches": 100836, "rejected": 0, "conflicts": 0,
 "services": {"user": {"handled": 100836, "repeated": 0, "failed_attempts": 0, "dead": 0, …}, …},
 "answer_ms": {"chain": {"p50": …, "p99": …}, "events": {…}}, "hit_rate_at_10": {"model": …, "popularity": …},
 "outage": {…}, "top": {…}, "user": {…}, "elapsed_s": …}
"""

from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from trilogue import App, Feature
from trilogue.apps.video.feed import AT_ONCE
from trilogue.apps.video.handled import marks
from trilogue.apps.video.platform import SERVICES
from trilogue.durations import readable

WATCH = "video.watch_started"
Json = dict[str, Any]


async def collect(app: App, sent: int) -> Json:
    """The part of the report that the log and the tables know.

    sent: how many watches this program has published, which is what counts where the log does not: on a broker.
    """
    status = await app.store.status()
    groups = {group.name: group for group in status.groups}
    return {
        "log": app.store.url,
        "watches": status.types.get(WATCH, 0) if Feature.HISTORY in app.store.features else sent,
        "services": {name: await _service(app, groups[name]) for name in SERVICES},
        "hit_rate_at_10": await _hit_rates(app),
        "notifications": dict(await app.db("select what, n from notification_totals")),
        "top": await _top(app),
        "user": await _user(app),
        "database_bytes": status.bytes,
    }


async def _service(app: App, group: Any) -> Json:
    handled, repeated = [(await app.db(f"select count(*) from {group.name}_{which}"))[0][0] for which in ("handled", "repeated")]
    return {
        "handled": handled,
        "repeated": repeated,
        "failed_attempts": group.failed,
        "retried": max(0, group.failed - group.dead),
        "dead": group.dead,
        "lag": group.lag,
    }


async def _hit_rates(app: App) -> Json:
    counts = dict(await app.db("select what, n from recommendation_judged"))
    judged = counts.get("watches", 0)
    share = {what: round(counts.get(what, 0) / judged, 4) if judged else None for what in ("model", "popularity")}
    return {**share, "judged": judged}


async def _top(app: App) -> Json:
    rows = "select title, watches from ranking_titles order by {} desc, video limit 5"
    genres = "select what, watches from analytics_genres order by watches desc, what limit 5"
    return {
        "all_time": [list(row) for row in await app.db(rows.format("watches"))],
        "trending": [list(row) for row in await app.db(rows.format("heat"))],
        "genres": [list(row) for row in await app.db(genres)],
        "hours": (await app.db("select count(*) from analytics_hours"))[0][0],
    }


async def _user(app: App) -> Json | None:
    """The user with the most films, as an example."""
    found = await app.db('select "user", films from badge_progress order by films desc, "user" limit 1')
    if not found:
        return None
    user, films = found[0]
    return {
        "user": user,
        "films": films,
        "taste": await taste(app, user),
        "badges": await badges(app, user),
        "recommendations": await recommendations(app, user),
    }


async def taste(app: App, user: str) -> list[str]:
    """A user's genres, the dearest first."""
    rows = await app.db('select genres from user_tastes where "user" = ?', (user,))
    weights = msgspec.json.decode(rows[0][0], type=dict[str, float]) if rows else {}
    return sorted(weights, key=weights.__getitem__, reverse=True)[:5]


async def badges(app: App, user: str) -> list[str]:
    """What a user has won, the oldest first."""
    rows = await app.db('select badge from badge_won where "user" = ? order by at_us, badge', (user,))
    return [badge for (badge,) in rows]


async def recommendations(app: App, user: str) -> list[str]:
    """The titles a user is shown, the best first."""
    found = await app.db('select shown from recommendation_users where "user" = ?', (user,))
    videos = msgspec.json.decode(found[0][0], type=list[str]) if found else []
    titles = f"select video, title from recommendation_titles where video in ({marks(videos)})"
    called = dict(await app.db(titles, videos)) if videos else {}
    return [called.get(video, video) for video in videos]


# ── for people ───────────────────────────────────────────────────────────────────────────────────────────────────────


def show(report: Json, console: Console) -> None:
    """Print a report."""
    console.print()
    console.print(_services(report))
    console.print(_answers(report))
    for line in _lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _services(report: Json) -> Table:
    table = Table(title=f"{report['watches']:,} watches, six services", title_justify="left", title_style="bold")
    for name in ("service", "watches handled", "failed attempts", "retried", "dead", "lag"):
        table.add_column(name, justify="left" if name == "service" else "right")
    for name, service in report["services"].items():
        complete = "green" if service["handled"] == report["watches"] else "yellow"
        counts = [f"{service[what]:,}" for what in ("failed_attempts", "retried", "dead", "lag")]
        table.add_row(name, f"[{complete}]{service['handled']:,}[/]", *counts)
    return table


def _answers(report: Json) -> Table:
    outage = report["outage"]
    table = Table(title="What the user waits for", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("watches", "p50", "p99"):
        table.add_column(name, justify="right")
    table.add_column(f"while {outage['service']} is down")
    for name, key, watches, meanwhile in (
        ("chain of calls", "chain", outage["sample"], _refused(outage)),
        ("events, one by one", "events_one_by_one", outage["sample"], _delivered(outage)),
        (f"events, {AT_ONCE} at once", "events", report["sent"] - outage["sample"], ""),
    ):
        times = report["answer_ms"][key]
        table.add_row(name, f"{watches:,}", _ms(times["p50"]), _ms(times["p99"]), meanwhile)
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else readable(value * 1_000)


def _refused(outage: Json) -> str:
    broken = outage["chain"]
    return f"{broken['refused']} refused, after {_ms(broken['refused_after_ms'])}" if outage["sample"] else ""


def _delivered(outage: Json) -> str:
    events = outage["events"]
    known = ", known from an earlier run" if events["delivered_before"] else f", {events['delivered_when_back']} caught up"
    return f"{events['refused']} refused{known}" if outage["sample"] else ""


def _lines(report: Json) -> list[str]:
    sent = report["notifications"]
    return [
        "",
        "Trending  " + _titles(report["top"]["trending"]),
        "All time  " + _titles(report["top"]["all_time"]),
        *_hit_lines(report["hit_rate_at_10"]),
        f"{sent.get('sent', 0):,} notifications sent, {sent.get('held back', 0):,} held back (three an hour are enough)",
        *(_user_lines(report["user"]) if report["user"] else ()),
        *_trouble_lines(report),
        f"{report['elapsed_s']:.1f} s in all; log and tables {report['database_bytes'] / 1e6:.0f} MB",
    ]


def _hit_lines(hits: Json) -> list[str]:
    if not hits["judged"]:
        return []
    return [
        f"{hits['model']:.1%} of what people watched was among the ten titles recommended to them before; "
        f"of the ten most popular it was {hits['popularity']:.1%}"
    ]


def _trouble_lines(report: Json) -> list[str]:
    lines = [
        f"{down['delivered']:,} events waited for {down['service']}; it was back and through in {down['seconds']:.1f} s"
        for down in report["down"]
    ]
    if report["rejected"]:
        lines.append(f"{report['rejected']:,} rows were no watches: see {report['rejects_file']}")
    if repeated := sum(service["repeated"] for service in report["services"].values()):
        lines.append(f"{repeated:,} times a watch that a service knew came again, and was passed over")
    if report["conflicts"]:
        lines.append(f"{report['conflicts']:,} watches are on the log with another title or other genres, and stay as they are")
    return lines


def _titles(rows: list[list[Any]]) -> str:
    return " · ".join(f"{_plain(title)} ({watches:,})" for title, watches in rows)


def _user_lines(user: Json) -> list[str]:
    return [
        "",
        f"{_plain(user['user'])} watched {user['films']:,} films",
        f"  taste     {', '.join(map(_plain, user['taste']))}",
        f"  badges    {', '.join(user['badges'])}",
        f"  next      {' · '.join(map(_plain, user['recommendations'][:5]))}",
        "",
    ]


def _plain(text: str) -> str:
    """Text from outside, without the control characters that would reach the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
