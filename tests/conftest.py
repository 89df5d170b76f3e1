"""What every test starts from: no test is judged by its time."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# Started behind a shell's `&`, every program here would be deaf to Ctrl-C, and so those that are asked to heed it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# All that is spoken to here is on this machine: a proxy that leads out of it would be asked for that, too.
if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1"

# The same examples each time: who looks for further ones says `--hypothesis-profile=exploring`.
settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("untimed", settings.get_profile("exploring"), derandomize=True, database=None)
settings.load_profile("untimed")
