"""What every test starts from: no test is judged by its time."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# Started behind a shell's `&`, every program here would be deaf to Ctrl-C, and so those that are asked to heed it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time: who looks for further ones says `--hypothesis-profile=exploring`.
settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("untimed", settings.get_profile("exploring"), derandomize=True, database=None)
settings.load_profile("untimed")
