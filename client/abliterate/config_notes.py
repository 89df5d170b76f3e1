"""What each key of `config.toml` is for: the words of the reference page.

A test holds them to the contract's keys, neither more nor fewer. Does not know defaults, types and bounds.
"""

from __future__ import annotations

from typing import Final

NOTES: Final[dict[str, str]] = {
    "paths.state": "journal, jobs, locks, the embedded engine's store",
    "paths.spool": "holds the in-tray, `incoming`; empty: `spool` in the state folder",
    "paths.models": "folders a spooled recipe may name files in (model, prompts, direction.file)",
    "proxy.listen": 'HOST:PORT; "" turns it off',
    "proxy.upstream": "where Ollama is, or where the embedded engine is started",
    "proxy.patterns": "which models are abliterated ones: matched against the name part and the tag part",
    "proxy.aliases": 'other names for models, as {"qwen3:8b-abliterated" = "qwen3-abliterated:8b"}',
    "proxy.during_jobs": "requests for answers while a job is at work: let through, kept waiting, or turned away",
    "proxy.hold_seconds": "how long hold lets one wait before it is answered 503",
    "proxy.auto_submit": "queue a missing abliterated model when a client of this machine asks for it",
    "proxy.assist": "tools and thinking where the engine lacks them; any: for models never taught, too",
    "proxy.assist_more": "more that engines drop, and the proxy then does",
    "proxy.allow_remote": "must be true before listen may name an address beyond loopback",
    "proxy.allowed_hosts": 'beyond loopback: names clients may call this machine by, besides its own; "*" for any',
    "proxy.access_log": "a file that gets a line of JSON for each exchange; not what was said in it",
    "upstream.pattern": 'which names: matched as `proxy.patterns` are, as in "*:70b*"',
    "upstream.url": 'where it is, as in "http://192.168.1.20:11434"',
    "engine.kind": "ollama: the one at proxy.upstream; embedded: the daemon starts one there; auto: whichever is there",
    "jobs.executor": "ray: on a cluster, see ray.md",
    "jobs.retries": "how often a job is tried again after what may pass",
    "jobs.keep_days": "then an ended job's recipe, log and report go; its model stays",
    "jobs.on_finish": "a command and its arguments, started when a job has ended or is held",
    "ray.address": "of the head's dashboard",
    "ray.python": "on the nodes; abliterated must be installed there",
    "ray.cpus": "of each job, as Ray counts them",
    "ray.gpus": "of each job, likewise",
    "ray.jobs": "so many at a time",
    "control.socket": "empty: in the runtime folder",
    "control.tcp": '"127.0.0.1:PORT" opens the same API there, for who has the token in the state folder',
    "tools.converter": "llama.cpp's convert_hf_to_gguf.py, or a program that is called as it is",
    "trust.remote_code": 'repositories whose own code may run, as "org/repo@commit"',
}
