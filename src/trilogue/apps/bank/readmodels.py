"""What people look at: tables folded from the events, in whole cents, and the typed rows they are read as.

balances     account | cents, limit_cents, status
statements   account, line | at_us, description, cents, balance_cents        line: the version of the account's stream
days         day | deposited_cents, withdrawn_cents, movements               day: since 1970, UTC
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from trilogue import App, Context, Db, Receipt, Router
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.events import (
    AccountClosed,
    AccountCreated,
    AccountEvent,
    FeeCharged,
    InterestPaid,
    LegRecalled,
    MoneyDeposited,
    MoneyWithdrawn,
)
from trilogue.apps.bank.money import ZERO, cents, from_cents

DAY_US = 86_400_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

router = Router()


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


@router.projection(
    version=2,
    tables={"balances": "account text primary key, cents bigint not null, limit_cents bigint not null, status text not null"},
)
def balances(es: list[AccountEvent], db: Db) -> None:
    """What every account holds."""
    rows = {e.account: (e.initial_deposit, e.overdraft_limit) for e in es if isinstance(e, AccountCreated)}
    db.executemany(
        "insert into {balances} values (?, ?, ?, 'open')",
        [(account, cents(first), cents(limit)) for account, (first, limit) in rows.items()],
    )
    # The event says what was there before: what is there now needs no reading, and the last event of an account is enough.
    now = {e.account: balance_after(e) for e in es}
    db.executemany("update {balances} set cents = ? where account = ?", [(cents(b), account) for account, b in now.items()])
    closed = [(e.account,) for e in es if isinstance(e, AccountClosed)]
    db.executemany("update {balances} set status = 'closed' where account = ?", closed)


@router.projection(
    version=2,
    tables={
        "statements": "account text, line bigint, at_us bigint not null, description text not null, cents bigint not null, "
        "balance_cents bigint not null, primary key (account, line)"
    },
)
def statements(e: AccountEvent, db: Db, ctx: Context) -> None:
    """Every movement of an account, with what was there afterwards."""
    line = (e.account, ctx.record.version, ctx.record.recorded_us, described(e), cents(movement(e)), cents(balance_after(e)))
    db.execute("insert into {statements} values (?, ?, ?, ?, ?, ?)", line)


@router.projection(
    version=2,
    tables={"days": "day bigint primary key, deposited_cents bigint, withdrawn_cents bigint, movements bigint"},
)
def days(e: AccountEvent, db: Db, ctx: Context) -> None:
    """How much came in and went out on each day, transfers not counted."""
    if getattr(e, "transfer", None) is not None:
        return
    amount = cents(movement(e))
    db.execute(
        "insert into {days} values (?, ?, ?, 1) on conflict (day) do update set movements = {days}.movements + 1, "
        "deposited_cents = {days}.deposited_cents + excluded.deposited_cents, "
        "withdrawn_cents = {days}.withdrawn_cents + excluded.withdrawn_cents",
        (ctx.record.recorded_us // DAY_US, max(amount, 0), max(-amount, 0)),
    )


def movement(e: AccountEvent) -> Decimal:
    """What an event adds to the balance; below zero: takes away."""
    match e:
        case AccountCreated():
            return e.initial_deposit
        case MoneyDeposited() | InterestPaid():
            return e.amount
        case MoneyWithdrawn() | FeeCharged():
            return -e.amount
        case LegRecalled():
            return ZERO
        case AccountClosed():
            return -e.final_balance


def balance_after(e: AccountEvent) -> Decimal:
    """The balance once this has happened."""
    match e:
        case AccountCreated():
            return e.initial_deposit
        case AccountClosed():
            return Decimal(0)
        case _:
            return e.before + movement(e)


def described(e: AccountEvent) -> str:
    """An event as a line of the statement."""
    match e:
        case AccountCreated():
            return "opened"
        case MoneyDeposited() | MoneyWithdrawn():
            return e.description
        case InterestPaid():
            return f"interest, month {e.month}"
        case FeeCharged():
            return f"fee, month {e.month}"
        case LegRecalled():
            return f"transfer {e.transfer} recalled"
        case AccountClosed():
            return "closed, paid out"


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Balance:
    """What an account holds."""

    account: str
    cents: int
    limit_cents: int
    status: str

    @property
    def amount(self) -> Decimal:
        """The balance."""
        return from_cents(self.cents)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a statement. line: from 1. cents: what came in (above zero) or went out. at_us: recorded time."""

    account: str
    line: int
    at_us: int
    description: str
    cents: int
    balance_cents: int

    @property
    def at(self) -> datetime:
        """When it was recorded."""
        return _EPOCH + timedelta(microseconds=self.at_us)


async def balance(app: App, account: str, *, after: Receipt | str | None = None) -> Balance | None:
    """What an account holds, as far as the table has got; None if it was never opened.

    after: the receipt of a decision (or its token), to see at least that.
    """
    of = None if after is None else "balances"
    found = await app.find(Balance, "select * from balances where account = ?", (account,), after=after, of=of)
    return found[0] if found else None


async def statement(app: App, account: str) -> list[Line]:
    """All lines of an account's statement, the oldest first."""
    return await app.find(Line, "select * from statements where account = ? order by line", (account,))


async def balance_at(app: App, account: str, at: datetime) -> Decimal:
    """What an account held at a recorded time: asked of the log, not of a table. at: with a time zone."""
    return (await app.load(Account, account, at=at)).balance
