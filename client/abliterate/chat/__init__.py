"""Talking to models: the engine's API as a client sees it, a conversation, and the terminal around both."""
