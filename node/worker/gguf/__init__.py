"""GGUF export: a loaded model, written so that llama.cpp and Ollama read it right."""

from __future__ import annotations

from node.worker.gguf.families import SUPPORTED, check_supported
from node.worker.gguf.writer import write_gguf

__all__ = ["SUPPORTED", "check_supported", "write_gguf"]
