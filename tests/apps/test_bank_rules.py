"""What an account may do: every rule for the class and for the functions, which must say the same."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from trilogue.apps.bank import deciders
from trilogue.apps.bank.account import Account
from trilogue.apps.bank.errors import (
    AccountExists,
    AccountInDebt,
    AccountIsClosed,
    BankError,
    InsufficientFunds,
    InvalidAmount,
    UnknownAccount,
)
from trilogue.apps.bank.events import (
    AccountClosed,
    AccountCreated,
    FeeCharged,
    InterestPaid,
    LegRecalled,
    MoneyDeposited,
    MoneyWithdrawn,
)
from trilogue.apps.bank.money import cents, from_cents, money, to_cents
from trilogue.testing import given

D = Decimal
ID = "ACC001"
OPEN = AccountCreated(ID, D("1000.00"), D("500.00"))
EMPTY = AccountCreated(ID, D("0.00"), D("0.00"))
CLOSED = (EMPTY, AccountClosed(ID, D("0.00")))
Rule = tuple[Any, ...]


@pytest.fixture(params=["class", "functions"])
def way(request: pytest.FixtureRequest) -> str:
    """Each rule is written twice."""
    return str(request.param)


def after(way: str, *past: object) -> Any:
    """given() for both: `.when(("withdraw", 5))`."""
    return given(Account, ID, *past) if way == "class" else given(deciders.accounts, ID, *past)


def rule(way: str, name: str, *values: Any) -> Any:
    """The same rule, as each way has it."""
    if way == "class":
        return lambda account: getattr(account, name)(*values)
    return getattr(deciders, name)(ID, *values)


ALLOWED: list[tuple[tuple[object, ...], Rule, tuple[object, ...]]] = [
    ((), ("create", 1000, 500), (OPEN,)),
    ((), ("create",), (EMPTY,)),
    ((OPEN,), ("deposit", "0.01", "coin"), (MoneyDeposited(ID, D("0.01"), "coin", D("1000.00")),)),
    ((OPEN,), ("withdraw", 1500, "all of it"), (MoneyWithdrawn(ID, D("1500.00"), "all of it", D("1000.00")),)),
    ((OPEN,), ("close",), (AccountClosed(ID, D("1000.00")),)),
    ((EMPTY,), ("close",), (AccountClosed(ID, D("0.00")),)),
    (
        (OPEN,),
        ("end_month", 3),
        (InterestPaid(ID, D("1.00"), 3, D("1000.00")), FeeCharged(ID, D("2.00"), 3, D("1001.00"))),
    ),
    ((EMPTY,), ("end_month", 1), ()),
    (CLOSED, ("end_month", 1), ()),
    ((), ("end_month", 1), ()),
    ((OPEN,), ("recall", "t1", "give"), (LegRecalled(ID, "t1", "give", D("1000.00")),)),
    ((), ("recall", "t1", "give"), (LegRecalled(ID, "t1", "give", D("0.00")),)),
    ((LegRecalled(ID, "t1", "give", D("0.00")),), ("recall", "t1", "give"), ()),
    (
        (OPEN, MoneyWithdrawn(ID, D("1499.50"), "", D("1000.00"))),
        ("end_month", 1),
        (FeeCharged(ID, D("0.50"), 1, D("-499.50")),),
    ),
]

REFUSED: list[tuple[tuple[object, ...], Rule, type[BankError], str]] = [
    ((OPEN,), ("create", 5), AccountExists, "open already"),
    (CLOSED, ("create", 5), AccountIsClosed, "closed"),
    ((), ("create", -1), InvalidAmount, "first deposit is -1.00"),
    ((), ("create", 1, -1), InvalidAmount, "overdraft limit is -1.00"),
    ((), ("deposit", 5), UnknownAccount, "no account ACC001"),
    ((), ("withdraw", 5), UnknownAccount, "no account ACC001"),
    ((), ("close",), UnknownAccount, "no account ACC001"),
    ((OPEN,), ("deposit", 0), InvalidAmount, "more than 0"),
    ((OPEN,), ("deposit", -5), InvalidAmount, "-5.00"),
    ((OPEN,), ("withdraw", -5), InvalidAmount, "-5.00"),
    ((OPEN,), ("deposit", 0.5), InvalidAmount, "Decimal"),
    ((OPEN,), ("withdraw", "1500.01"), InsufficientFunds, "cannot pay 1500.01: 1500.00 is available"),
    ((OPEN, MoneyWithdrawn(ID, D("1200.00"), "", D("1000.00"))), ("close",), AccountInDebt, "in debt by 200.00"),
    (CLOSED, ("close",), AccountIsClosed, "closed"),
    (CLOSED, ("deposit", 5), AccountIsClosed, "closed"),
    (CLOSED, ("withdraw", 5), AccountIsClosed, "closed"),
]


@pytest.mark.parametrize(("past", "asked", "happened"), ALLOWED, ids=lambda value: str(value)[:40])
def test_what_is_allowed_happens(way: str, past: tuple[object, ...], asked: Rule, happened: tuple[object, ...]) -> None:
    after(way, *past).when(rule(way, *asked)).then(*happened)


@pytest.mark.parametrize(("past", "asked", "error", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_is_refused(way: str, past: tuple[object, ...], asked: Rule, error: type[BankError], said: str) -> None:
    after(way, *past).when(rule(way, *asked)).rejects(error, said)


def test_insufficient_funds_names_what_was_available_and_asked() -> None:
    account = Account(ID)
    account.create(1000, 500)
    with pytest.raises(InsufficientFunds) as refused:
        account.withdraw("1500.01")
    assert (refused.value.available, refused.value.asked) == (D("1500.00"), D("1500.01"))
    assert account.uncommitted == (OPEN,)


def test_the_scenario_by_hand() -> None:
    account = Account(ID)
    balances = []
    for name, amount in (("create", 1000), ("deposit", 500), ("withdraw", 200), ("withdraw", 800), ("deposit", 300)):
        getattr(account, name)(*((amount, 500) if name == "create" else (amount,)))
        balances.append(account.balance)
    account.withdraw(1200)
    assert [*balances, account.balance] == [1000, 1500, 1300, 500, 800, -400]


# ── money ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", [0.1, 1e3, True, None, "a lot", "", "NaN", "-Infinity", "0.001", D("1e15"), D("sNaN"), "1e999"])
def test_what_is_no_money_is_refused_at_the_door(wrong: Any) -> None:
    with pytest.raises(InvalidAmount, match=r"no amount of money|finer than a cent"):
        money(wrong)


CENTS = [(5, "5.00"), ("5.5", "5.50"), (D("1E+2"), "100.00"), ("-0", "0.00"), ("5.500", "5.50")]


@pytest.mark.parametrize(("said", "meant"), CENTS)
def test_money_is_whole_cents(said: Any, meant: str) -> None:
    assert str(money(said)) == meant


@for_all(st.integers(-(10**16), 10**16))
def test_cents_and_back(number: int) -> None:
    assert cents(from_cents(number)) == number


def test_halves_are_rounded_to_the_even_cent() -> None:
    assert [str(to_cents(D(text))) for text in ("0.005", "0.015", "0.025", "-0.005")] == ["0.00", "0.02", "0.02", "-0.00"]


# ── both ways are the same account ───────────────────────────────────────────────────────────────────────────────────

AMOUNTS = st.integers(-50, 200_000).map(from_cents)
RULES = st.one_of(
    st.tuples(st.just("create"), AMOUNTS, AMOUNTS),
    st.tuples(st.sampled_from(("deposit", "withdraw")), AMOUNTS),
    st.tuples(st.just("end_month"), st.integers(1, 40)),
    st.tuples(st.just("close")),
)


@for_all(st.lists(RULES, max_size=30))
def test_the_class_and_the_functions_say_the_same(asked: list[Rule]) -> None:
    account, state = Account(ID), deciders.State()
    for name, *values in asked:
        before = account.uncommitted
        mine = _outcome(lambda a, name=name, values=values: getattr(a, name)(*values), account)
        theirs = _outcome(getattr(deciders, name)(ID, *values), state)
        if mine is None:
            assert list(account.uncommitted[len(before) :]) == theirs
            for e in theirs:
                state = deciders.evolve(state, e)
        else:
            assert mine == theirs
        assert (account.status, account.balance, account.overdraft_limit) == (state.status, state.balance, state.overdraft_limit)
        assert account.available >= 0


def _outcome(decide: Any, state: Any) -> Any:
    try:
        return decide(state)
    except BankError as error:
        return type(error), str(error)
