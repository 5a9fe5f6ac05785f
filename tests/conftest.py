"""Machines are shared and slow at times: no test may depend on how fast it ran."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "llmd", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llmd")
