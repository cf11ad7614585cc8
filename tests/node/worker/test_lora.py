"""A LoRA layer in one product gives what ``mlx_lm``'s gives, with the same gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRALinear

from node.worker.lora import JoinedLoRALinear, join_adapters


class Holder(nn.Module):  # type: ignore[misc]
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.layer(x)
        return result


def results(model: nn.Module, x: mx.array) -> list[mx.array]:
    """Outputs, and gradients with regard to the input and both halves of the adapter."""
    layer = model.layer
    a, b = layer.lora_a, layer.lora_b

    def of(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        layer.lora_a, layer.lora_b = a, b
        outputs = model(x)
        return mx.square(outputs.astype(mx.float32)).sum(), outputs

    (_, outputs), gradients = mx.value_and_grad(of, argnums=(0, 1, 2))(x, a, b)
    layer.lora_a, layer.lora_b = a, b
    return [outputs, *gradients]


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2), (mx.float16, 2e-3)])
def test_the_same_numbers_and_gradients(dtype: mx.Dtype, tolerance: float, bias: bool, bits: int) -> None:
    mx.random.seed(3)
    linear: Any = nn.Linear(64, 96, bias=bias)
    linear.set_dtype(dtype)
    if bits:
        linear = linear.to_quantized(64, bits)
    model = Holder(LoRALinear.from_base(linear, r=4, scale=7.0))
    model.layer.lora_b = mx.random.normal(model.layer.lora_b.shape)
    x = mx.random.normal((2, 5, 64)).astype(dtype)
    wanted = results(model, x)
    names = dict(model.parameters()["layer"])
    join_adapters(model)
    assert type(model.layer) is JoinedLoRALinear
    assert isinstance(model.layer, LoRALinear)
    assert model.parameters()["layer"].keys() == names.keys()
    for one, other in zip(results(model, x), wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        apart = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max() / mx.abs(other.astype(mx.float32)).max()
        assert apart.item() < tolerance  # type: ignore[operator]
