"""Which layers compute their activations again in the backward pass."""

from __future__ import annotations

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.typed_config import is_int

_PARTS = ("attention", "mlp")


def check_choice(value: bool | int | str) -> bool | int | str:
    """The value, or ValueError unless it is False, True, a number of layers, "attention" or "mlp"."""
    if isinstance(value, bool) or value in _PARTS or (is_int(value) and int(value) >= 1):
        return value
    hint = did_you_mean(value, _PARTS) if isinstance(value, str) else ""
    raise bad_argument(
        "activation_checkpointing",
        repr(value),
        f"True, False, n >= 1 for every n-th layer, 'attention' or 'mlp'{hint}",
        "use one of these",
    )


def is_checkpointed(choice: bool | int | str, layer: int) -> bool:
    """Whether this layer keeps nothing but its input."""
    return not isinstance(choice, str) and bool(choice) and layer % int(choice) == 0
