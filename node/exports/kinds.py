"""Which models and files the exporters know."""

from __future__ import annotations

# Model types that the GGUF writer knows; a test compares them with its table.
GGUF_MODEL_TYPES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "gemma", "gemma2", "gemma3_text", "gemma3", "phi", "phi3",
)  # fmt: skip

# Model types whose modules have the same paths in mlx_lm as in transformers.
PEFT_MODEL_TYPES = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "granite",
        "helium",
        "internlm2",
        "llama",
        "minicpm",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)

# Beside the weights and config.json, all that makes a model folder: its tokenizer, its templates, its own code.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
)
WEIGHTS = ("config.json", "model*.safetensors", "model.safetensors.index.json", "README.md", "*.gguf", "Modelfile")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
