"""Interest and fees, once a month for every account: a timer that sets itself again.

AccountCreated ──▶ Timer("month", 30 days) ──▶ EndMonth(1), Timer("month", 30 days) ──▶ EndMonth(2), … ──AccountClosed──▶ end
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trilogue import App, End, Process, Retry, Timer, event, reacts, starts, timer
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.events import AccountClosed, AccountCreated

MONTH = "30d"


@event("account.end_month", key="account")
@dataclass(frozen=True, slots=True)
class EndMonth:
    """Command: pay interest and charge the fee of a month. month: from 1."""

    account: str
    month: int


class Months(Process, key="account", name="months"):
    """The months of one account. month: how many have ended."""

    month: int = 0

    @starts
    def opened(self, e: AccountCreated) -> Timer:
        """The first month begins."""
        return Timer("month", after=MONTH)

    @timer("month")
    def ends(self) -> Iterator[object]:
        """A month is over, the next one begins."""
        self.month += 1
        yield EndMonth(self.id, self.month)
        yield Timer("month", after=MONTH)

    @reacts
    def closed(self, e: AccountClosed) -> End:
        """No more months."""
        return End()


def end_months(app: App) -> None:
    """Register the handler that ends a month of an account, each once."""

    @app.on(group="bank.months", retry=Retry(25, "20ms..30s"))
    async def end_month(e: EndMonth) -> None:
        await app.decide(Account, e.account, lambda a: a.end_month(e.month), once=f"month {e.month}")
