"""The control API: a unix socket for the client. Never on Ollama's port."""
