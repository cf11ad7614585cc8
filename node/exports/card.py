"""The model card, which also marks a folder as written by us."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MARK = "mlx-tandem"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KEPT = ("license", "license_name", "license_link", "language")


def model_card(base: Path, source: str) -> str:
    """A short ``README.md`` for a fused model, with the base model's name and licence.

    Args:
        base: folder of the base model.
        source: the base model's name on the Hub, or anything else to leave it out.
    """
    known = front_matter(base / "README.md")
    data: dict[str, Any] = {key: known[key] for key in KEPT if key in known}
    data.update(library_name="mlx", pipeline_tag="text-generation", tags=["mlx", MARK])
    if is_hub_name(source):
        data["base_model"] = source
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    title = f"# {name_of(source)}, fine-tuned\n" if source else "# A fine-tuned model\n"
    use = '```python\nfrom mlx_lm import generate, load\n\nmodel, tokenizer = load("PATH")\n```\n'
    return f"---\n{head}---\n\n{title}\nFine-tuned and fused with mlx-tandem. It loads with `mlx_lm`:\n\n{use}"


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML block at the top of a model card; empty when there is none that can be read."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        content = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def is_ours(folder: Path) -> bool:
    """Whether a model or adapter folder was written by us."""
    return MARK in (front_matter(folder / "README.md").get("tags") or [])


def is_hub_name(source: str) -> bool:
    """Whether this reads as ``owner/name`` on the Hub rather than as a path."""
    return bool(HUB_NAME.fullmatch(source)) and not Path(source).exists()


def name_of(source: str) -> str:
    """The last part of a Hub name or path."""
    return Path(source).name
