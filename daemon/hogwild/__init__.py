"""hogwild: a vLLM server's own weights keep learning while it serves."""

__version__ = "0.1.0"
