"""What every test starts from: no test is judged by its time."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples each time: who looks for further ones says `--hypothesis-profile=exploring`.
settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("untimed", settings.get_profile("exploring"), derandomize=True, database=None)
settings.load_profile("untimed")
