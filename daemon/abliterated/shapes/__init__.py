"""The four chat APIs as Ollama speaks them: requests read into one conversation, answers told piece by piece.

Nobody's room in particular: the embedded engine answers with it, and so does the proxy where it helps. Pure.
"""
