"""From options to tokenised data: what training and evaluation both begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.config import TrainConfig
from coordinator.data.hub import find_source
from coordinator.data.prepare import prepare
from coordinator.data.rows import Features
from coordinator.data.source import Split
from coordinator.data.tokenise import TokeniseOptions
from coordinator.data.tokenset import TokenSet
from coordinator.home import token_cache
from coordinator.models import ResolvedModel


def token_sets(
    config: TrainConfig,
    model: ResolvedModel,
    advance: Callable[[str, int, int], None],
    splits: tuple[Split, ...],
    required: tuple[Split, ...] = (),
) -> dict[Split, TokenSet]:
    """Tokenise splits of the data set that the options name.

    Args:
        config: names the data, the mask and the lengths.
        model: whose tokenizer is used.
        advance: told a task, what is done and the total.
        splits: which are wanted; "valid" may be missing unless it is required.
        required: those that must exist.

    Raises:
        UserError: the data, the tokenizer or the disk is not as it must be.
    """
    mask: Any = config.target_mask
    features = Features(config.prompt_feature, config.completion_feature, config.chat_feature, config.text_feature)
    source = find_source(config.data, config.hf_dataset, features, token_cache(), advance, splits)
    for split in required:
        source.files(split)
    options = TokeniseOptions(config.max_seq_length, mask, config.trust_remote_code)
    return prepare(source, model.path, options, token_cache(), advance, splits, name=model.name)
