"""The activations by name, and the order of the halves of a packed gate and value."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from flash_attn_ops.arguments import bad_argument

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared_relu", "silu", "sigmoid")
_OTHER_NAMES = {"gelu_approx": "gelu_tanh", "sqrelu": "squared_relu", "swish": "silu"}
ORDERS = ("gate_value", "value_gate")

Order = Literal["gate_value", "value_gate"]


def activation_name(activation: str) -> str:
    """The one name under which an activation is known here."""
    name = _OTHER_NAMES.get(activation, activation) if isinstance(activation, str) else None
    if name not in ACTIVATIONS:
        known = ", ".join(map(repr, (*ACTIVATIONS, *_OTHER_NAMES)))
        raise bad_argument("activation", repr(activation), f"one of {known}", "use one of these names")
    return name


def check_order(order: str | None) -> None:
    if order not in ORDERS:
        raise bad_argument(
            "order",
            repr(order),
            "'gate_value' or 'value_gate' for a packed tensor",
            "say which half of the last dimension is the gate",
        )


def split(packed: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """``(gate, value)``, views of a packed (..., 2N) tensor."""
    size = packed.shape[-1] // 2
    first, second = packed[..., :size], packed[..., size:]
    return (first, second) if order == "gate_value" else (second, first)
