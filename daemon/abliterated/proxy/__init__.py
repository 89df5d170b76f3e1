"""The proxy room: what stands on Ollama's port and passes every byte through.

`server` has the public names (`Proxy`, `Steering`), `alone` runs it as a process, `assist` is the seam where help may
answer a request. The others are its parts: `listen` (addresses), `policy`, `routing` and `headers` (pure decisions),
`framing` and `responses` (where a message begins and ends), `finder` and `payload` (which model a body names), `relay`
on `pair` (the bytes), `gate` (a request that is looked at or held), `wiring` and `endings` (how the two sides hang
together, and part), `answers` and `missing` (the few replies that are our own), `marks` and `access` (what is noted).
"""
