"""`trilogue erase`: destroy the key of one person, so that nobody reads their data any more.

erase u7 --reason "asked on 3 May"          asks first; prints what was done and what still is to do
erase u7 --reason "asked on 3 May" --yes    without asking; again at any time to complete it
"""

import dataclasses
from typing import Annotated

from cyclopts import Parameter

from trilogue.cli.act import Yes, confirm
from trilogue.cli.log import DEFAULT_LOG, Json, Log, opened
from trilogue.cli.output import note, safe, say, say_json, stamp
from trilogue.durations import microseconds
from trilogue.privacy import ErasureReceipt, erase, keys_path
from trilogue.stores.keys import Keyring

COMPLETE, INCOMPLETE = 0, 1


async def erase_subject(
    subject: Annotated[str, Parameter(help="The person, as the field `subject=` of the events names them.")],
    /,
    *,
    reason: Annotated[str, Parameter(help="Why; kept on the log, so without personal data.")],
    timeout: Annotated[str, Parameter(help="How long to wait for the groups that react.", show_default=True)] = "10s",
    yes: Yes = False,
    json: Json = False,
    log: Log = DEFAULT_LOG,
) -> int:
    """Erase a person: destroy the key their personal data is sealed with, and tell all read models.

    Exit code 1 if something is still to be done, which is said; the data is unreadable all the same.
    """
    microseconds(timeout)
    async with opened(log) as store:
        keys = Keyring()
        keys.open(keys_path(store))
        try:
            note(f"the key of {safe(subject)} in {safe(keys.path)} would be destroyed, which cannot be undone")
            confirm(yes, "erase")
            receipt = await erase(store, keys, subject, reason=reason, source="trilogue erase", timeout=timeout)
        finally:
            keys.close()
    _show(receipt, json)
    return INCOMPLETE if receipt.open else COMPLETE


def _show(receipt: ErasureReceipt, json: bool) -> None:
    if json:
        say_json({**dataclasses.asdict(receipt), "erased": stamp(receipt.erased_us)})
        return
    again = "erased before, " if receipt.is_repeated else ""
    say(f"{safe(receipt.subject)}: {again}erased {stamp(receipt.erased_us)}, because: {safe(receipt.reason)}")
    for sentence in receipt.done:
        say(f"  done  {safe(sentence)}")
    for sentence in receipt.open:
        say(f"  open  {safe(sentence)}")
