"""LoRA's sum in one product: the same numbers as ``mlx_lm``'s layer, with fewer passes over its outputs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear


class JoinedLoRALinear(LoRALinear):
    """A ``LoRALinear`` that scales on the narrow side, and adds as it multiplies."""

    def __call__(self, x: mx.array) -> mx.array:
        """(…, outputs) of (…, inputs)."""
        base: mx.array = self.linear(x)
        narrow = self.scale * (self.dropout(x) @ self.lora_a)
        if base.dtype == narrow.dtype == self.lora_b.dtype:
            return mx.addmm(base, narrow, self.lora_b)
        # Adapters are fp32 above bases of 16 bits: joined, the wide side would be converted both ways.
        return base + (narrow @ self.lora_b).astype(x.dtype)


def join_adapters(model: nn.Module) -> None:
    """Have every LoRA layer of the model compute so, in place; names and parameters stay as they are."""
    for _, module in model.named_modules():
        if type(module) is LoRALinear:
            module.__class__ = JoinedLoRALinear
