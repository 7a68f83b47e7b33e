"""Level 3, event sourcing: there is no balance anywhere, only what happened; the balance is the sum of it.

Paid("ann", 100) ── Paid("ann", -30) ── Paid("ann", 50)   ──sum──>   100 ── 70 ── 120       now, and at any time before
"""

from dataclasses import dataclass
from decimal import Decimal

from trilogue import App, Context, Retry, event
from trilogue.apps.levels.services import Services

NUMBER, NAME = 3, "event sourcing"


@event("purse.paid", key="purse")
@dataclass(frozen=True, slots=True)
class Paid:
    """Money went into a purse, or out of it if the amount is below zero."""

    purse: str
    amount: Decimal


EVENTS = tuple(Paid("ann", Decimal(amount)) for amount in ("100.00", "-30.00", "50.00"))


async def publish(app: App) -> None:
    """Let it happen, on the books: in a transaction it enters the store's log first, and a broker gets it from there."""
    async with app.transaction() as books:
        books.publish(*EVENTS)


def receiver(app: App, services: Services) -> list[str]:
    """Purse Service: tells the balance after each payment; returns the list in which it does. services: are not asked."""
    done: list[str] = []

    @app.on(group="purse", retry=Retry(25, "10ms..200ms"))
    async def tell(e: Paid, ctx: Context) -> None:
        payments = []
        async for record in app.history(types="purse.paid", key=e.purse):
            payments.append(app.decode(record).amount)
            if record.id == ctx.record.id:
                break
        done.append(f"{e.purse} has {sum(payments)}: {' '.join(f'{amount:+}' for amount in payments)}")

    return done
