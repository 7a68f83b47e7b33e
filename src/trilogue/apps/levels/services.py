"""The services a receiver might have to ask. Every question is counted, and while they are down every one fails.

services.user("ann")        ──> User("ann", "ann@example.org")      services.asked["user"] += 1
"""

from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class User:
    """Somebody with an address."""

    name: str
    email: str


@dataclass(frozen=True, slots=True)
class Product:
    """Something that is sold."""

    name: str
    price: Decimal


USERS = {name: User(name, f"{name}@example.org") for name in ("ann", "bob", "cid")}
PRODUCTS = {name: Product(name, Decimal(price)) for name, price in (("lamp", "40.00"), ("chair", "85.50"), ("desk", "310.00"))}


class ServiceDown(Exception):
    """The service that was asked does not answer."""


@dataclass
class Services:
    """User Service and Product Service, as others see them. asked: how often each was, whether it answered or not."""

    asked: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    down: bool = False

    async def user(self, name: str) -> User:
        """One user; raises ServiceDown."""
        self._ask("user")
        return USERS[name]

    async def product(self, name: str) -> Product:
        """One product; raises ServiceDown."""
        self._ask("product")
        return PRODUCTS[name]

    def _ask(self, service: str) -> None:
        self.asked[service] += 1
        if self.down:
            self.refused += 1
            raise ServiceDown(f"service {service!r} does not answer")
