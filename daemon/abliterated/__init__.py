"""The daemon: a sidecar for Ollama. Importing it imports neither torch nor transformers."""

from abliterate import __version__ as __version__
