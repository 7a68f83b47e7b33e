"""Three levels of event-driven systems, as three small modules of the same shape.

    notification.py      the event says that something happened; who wants to know more must ask
    state_transfer.py    the event brings along what its receivers need
    sourcing.py          the events are all there is; what is asked of them is a sum

`trilogue demo levels` runs and counts them.
"""

from trilogue.apps.levels.demo import demo_levels

__all__ = ["demo_levels"]
