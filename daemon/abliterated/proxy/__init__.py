"""The proxy room: what stands on Ollama's port and passes every byte through.

`server` has the public names (`Proxy`, `run`); the others are its parts: `listen` (addresses), `policy` and
`headers` (pure decisions), `framing` and `responses` (where a message begins and ends), `relay` (the bytes),
`wiring` and `endings` (how its two sides hang together, and part), `answers` (the few replies that are our own).
"""
