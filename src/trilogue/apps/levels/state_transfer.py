"""Level 2, event-carried state transfer: the event brings along what its receivers need.

OrderCreated("o1", user=ann@example.org, product=lamp 40.00) ──> Invoice Service          it calls nobody
"""

from dataclasses import dataclass

from trilogue import App, Retry, event
from trilogue.apps.levels.services import PRODUCTS, USERS, Product, Services, User

NUMBER, NAME = 2, "event-carried state transfer"


@event("order.created", key="order")
@dataclass(frozen=True, slots=True)
class OrderCreated:
    """Somebody ordered something, both as they were then."""

    order: str
    user: User
    product: Product


EVENTS = tuple(OrderCreated(f"o{n}", *both) for n, both in enumerate(zip(USERS.values(), PRODUCTS.values(), strict=True), 1))


async def publish(app: App) -> None:
    """Let it happen."""
    await app.publish_many(EVENTS)


def receiver(app: App, services: Services) -> list[str]:
    """Invoice Service: writes an invoice; returns the list in which it notes what it did. services: are not asked."""
    done: list[str] = []

    @app.on(group="invoice", retry=Retry(25, "10ms..200ms"))
    async def invoice(e: OrderCreated) -> None:
        done.append(f"invoice {e.order}: {e.product.name}, {e.product.price} to {e.user.email}")

    return done
