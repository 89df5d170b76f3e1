"""The demo: the whole story on a model it brings along, with real processes, and figures at the end."""
