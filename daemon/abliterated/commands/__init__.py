"""One module a verb of `abliterated`: parse, call, print. `add` describes it, `run` does it."""
