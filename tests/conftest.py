"""What every test starts from: no test is judged by its time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("untimed")
