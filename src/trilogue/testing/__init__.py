"""For the tests of programs on trilogue: their own app under a virtual clock, and given/when/then for what decides.

simulated(app)      real handlers, real store, real retries; time stands still, faults happen on request
given(...)          a model, the events that happened, what is done now, what must come of it: no event loop, no log
"""

from trilogue.testing.given import given
from trilogue.testing.steps import ended
from trilogue.testing.world import Held, World, simulated

__all__ = ["Held", "World", "ended", "given", "simulated"]
