"""The pipeline: a model's file in, the direction it refuses along found, an edited model's file out.

The only room that imports torch, transformers and gguf; a worker process or a foreground verb imports it, lazily.
Does not know jobs, sockets or Ollama: names are resolved to files before it starts.
"""
