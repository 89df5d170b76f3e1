"""The embedded engine: Ollama's HTTP API over real llama.cpp, for machines where no Ollama is installed.

A process of its own (`main`), started by the daemon or by hand. Its front (aiohttp) answers, keeps the store on disk
and starts one *runner* process for each loaded model; only a runner imports xllamacpp, so a failed assertion in C++
ends that runner and nothing else, and unloading is the end of a process.

Does not know: recipes, jobs, the proxy. The daemon never imports this package's modules; it starts `python -m
abliterated.engine`.
"""
