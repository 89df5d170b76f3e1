"""The client of `abliterated`: submits recipes and follows them. Never imports the daemon, never imports torch."""

__version__ = "0.1.0"
