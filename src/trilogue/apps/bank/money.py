"""Money is a Decimal of whole cents, from the door to the log (as text in JSON) and back. Never a float.

money(5) ─ money("5.00") ─ money(Decimal("5"))  ──>  Decimal("5.00")          cents ──> the tables of the projections
money(0.1) ─ money("0.001") ─ money("NaN")      ──>  InvalidAmount
"""

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

from trilogue.apps.bank.errors import InvalidAmount

CENT = Decimal("0.01")
ZERO = Decimal("0.00")
MOST = Decimal(10) ** 15


def money(amount: Decimal | int | str) -> Decimal:
    """An amount in whole cents, below 10^15 either way.

    Raises InvalidAmount for a float, for less than a cent and for what is no number.

    >>> money("5")
    Decimal('5.00')
    """
    if isinstance(amount, bool) or not isinstance(amount, (Decimal, int, str)):
        raise InvalidAmount(f"{amount!r} is no amount of money: expected a Decimal, a whole number or a text, as '12.50'")
    try:
        exact = Decimal(amount)
    except InvalidOperation:
        raise InvalidAmount(f"{amount!r} is no amount of money: expected digits, as '12.50'") from None
    if not exact.is_finite() or abs(exact) >= MOST:
        raise InvalidAmount(f"{amount!r} is no amount of money: expected less than 10^15")
    # Rounding here would make or lose money: whoever divides has to say which way.
    if (whole := exact.quantize(CENT)) != exact:
        raise InvalidAmount(f"{amount!r} is finer than a cent: round it first, as to_cents() does")
    return whole + 0  # no minus zero


def positive(amount: Decimal | int | str) -> Decimal:
    """An amount above zero; raises InvalidAmount."""
    if (checked := money(amount)) <= 0:
        raise InvalidAmount(f"the amount is {checked}: expected more than 0")
    return checked


def to_cents(amount: Decimal) -> Decimal:
    """What was computed, rounded to whole cents, halves to the even one.

    >>> to_cents(Decimal("1000") / 3)
    Decimal('333.33')
    """
    return amount.quantize(CENT, ROUND_HALF_EVEN)


def cents(amount: Decimal) -> int:
    """Whole cents as a number: what the tables hold.

    >>> cents(Decimal("12.50"))
    1250
    """
    return int(amount * 100)


def from_cents(number: int) -> Decimal:
    """The amount of so many cents.

    >>> from_cents(1250)
    Decimal('12.50')
    """
    return (Decimal(number) / 100).quantize(CENT)
