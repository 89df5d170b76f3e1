"""Chat templates: what a Jinja template can do, a better one where it can't do tools, a Go template that says the same."""
