"""Puts the daemon beside Ollama as a service, and takes it away again: plans (pure), texts, the machine."""
