"""Chat templates, by what they do: a better Jinja where one can't do tools, a Go template that says what a Jinja says.

Nobody's room in particular: the pipeline bakes the one, registration sends the other. Pure but for `worker`.
"""
