"""For all tests: Hypothesis asserts no wall times."""

from hypothesis import HealthCheck, settings

settings.register_profile("here", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")
