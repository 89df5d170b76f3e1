"""The queue: journal (the truth about every job), scheduler (pure), worker processes and the GPU lock."""
