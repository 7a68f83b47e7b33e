"""One account's story: opened, used into its overdraft, looked at in the past, kept in a snapshot, written by two at once.

    ACC001   +1000 ── +500 ── -200 ── -800 ── +300 ── -1200            overdraft limit 500
              1000    1500    1300     500     800     -400

Told again on a database that was kept, it goes on where it ended.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from trilogue import App, Conflict, Record, audited
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.errors import InsufficientFunds
from trilogue.apps.bank.events import AccountCreated
from trilogue.apps.bank.money import ZERO

Json = dict[str, Any]
ACCOUNT = "ACC001"
STEPS: tuple[Callable[[Account], None], ...] = (
    lambda a: a.create(1000, overdraft_limit=500),
    lambda a: a.deposit(500, "salary"),
    lambda a: a.withdraw(200, "cash"),
    lambda a: a.withdraw(800, "rent"),
    lambda a: a.deposit(300, "refund"),
    lambda a: a.withdraw(1200, "loan"),
)


async def play(app: App) -> Json:
    """Play the scenario; what became of it."""
    known = (await app.load(Account, ACCOUNT)).version
    with audited(who="clerk 7", why="demonstration"):
        for step in STEPS[known:]:
            async with app.edit(Account, ACCOUNT) as account:
                step(account)
    kept = await app.take_snapshot(Account, ACCOUNT)
    return {
        "account": ACCOUNT,
        "balances": [await _balance(app, version) for version in range(1, len(STEPS) + 1)],
        "history": await _history(app),
        "at_event_3": await _balance(app, 3),
        "refused": await _too_much(app),
        **await _two_at_once(app),
        "snapshot": await _rebuilt(app, kept),
    }


async def _balance(app: App, version: int) -> int | float:
    return number((await app.load(Account, ACCOUNT, version=version)).balance)


async def _history(app: App) -> list[Json]:
    return [_line(app, record) async for record in app.history(stream=f"account-{ACCOUNT}", limit=len(STEPS))]


def _line(app: App, record: Record) -> Json:
    event = app.decode(record)
    return {
        "version": record.version,
        "at": record.recorded.isoformat(),
        "who": record.who,
        "event": type(event).__name__,
        "amount": number(event.initial_deposit if isinstance(event, AccountCreated) else event.amount),
        "description": getattr(event, "description", ""),
        "before": number(getattr(event, "before", ZERO)),
    }


async def _too_much(app: App) -> str | None:
    """What the bank says to somebody who asks for more than there is: asked of the past, nothing is written."""
    try:
        await app.what_if(Account, ACCOUNT, lambda a: a.withdraw(1000), version=len(STEPS))
    except InsufficientFunds as error:
        return str(error)
    return None


async def _two_at_once(app: App) -> Json:
    """Two copies are loaded, both deposit; the first to save wins."""
    first, second = await app.load(Account, ACCOUNT), await app.load(Account, ACCOUNT)
    first.deposit(1, "first copy")
    second.deposit(1, "second copy")
    await app.save(first)
    try:
        await app.save(second)
    except Conflict as error:
        return {"conflict": True, "conflict_said": str(error)}
    return {"conflict": False, "conflict_said": None}


async def _rebuilt(app: App, kept: int) -> Json:
    """Whether the kept state and the events after it give the same account as all its events, folded here.

    kept: the version of the snapshot.
    """
    loaded, rebuilt = await app.load(Account, ACCOUNT), Account(ACCOUNT)
    async for record in app.history(stream=f"account-{ACCOUNT}"):
        rebuilt.apply(app.decode(record))
    return {"version": kept, "later_events": loaded.version - kept, "same": loaded == rebuilt}


def number(amount: Decimal) -> int | float:
    """An amount as a JSON number; a whole one without a point.

    >>> number(Decimal("1000.00"))
    1000
    """
    return int(amount) if amount == amount.to_integral_value() else float(amount)
