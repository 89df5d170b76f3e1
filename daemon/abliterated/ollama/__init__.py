"""The engine's room: talk to an Ollama (or the embedded engine), find a base in it, register a product with it.

Does not know jobs, the spool or the proxy; never imports torch.
"""
