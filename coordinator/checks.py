"""What can be found out before anything expensive starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from coordinator.config import TrainConfig
from coordinator.data.tokenset import TokenSet
from node.errors import UserError


def check_options(config: TrainConfig, *, resume: bool) -> None:
    """Mistakes that need nothing but the options.

    Raises:
        UserError: with the option's name and how to mend it.
    """
    if not config.model:
        raise UserError("--model: say which model, a Hugging Face repo or a local folder")
    if config.nodes not in ("auto", "local"):
        raise UserError(f"--nodes {config.nodes}: no such node found; use auto or local for this machine")
    if config.resume_adapter_file:
        if resume:
            raise UserError("--resume and --resume-adapter-file exclude each other; --resume restores everything")
        if not Path(config.resume_adapter_file).is_file():
            raise UserError(f"--resume-adapter-file {config.resume_adapter_file}: no such file")
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name}: not installed; pip install {name}")
    if not config.fuse and (config.upload_repo or config.dequantize):
        option = "--upload-repo" if config.upload_repo else "--dequantize"
        raise UserError(f"{option} needs --fuse: it is the fused model that it is about")


def data_warnings(split: str, tokens: TokenSet) -> list[str]:
    """What a person should know of a tokenised set, one line each."""
    lines = []
    if tokens.truncated:
        count, limit = f"{tokens.truncated:,} of {len(tokens):,}", tokens.max_seq_length
        lines.append(f"{split}: {count} rows are longer than --max-seq-length {limit} and were cut")
    if tokens.dropped:
        lines.append(f"{split}: {tokens.dropped:,} rows were left out: nothing in them is trained on")
    return lines
