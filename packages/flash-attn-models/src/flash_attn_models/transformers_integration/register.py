"""Registration of our attention with transformers."""

from __future__ import annotations

from flash_attn_models.errors import bad_argument
from flash_attn_models.transformers_integration.attention import attention_forward
from flash_attn_models.transformers_integration.masks import attention_mask
from flash_attn_models.transformers_integration.model_code import allow_while_compiling

ATTENTION_NAME = "fa_kernels"


def register_with_transformers(name: str = ATTENTION_NAME) -> str:
    """Make our attention available to every transformers model that takes an attention implementation by name.

    Afterwards ``AutoModelForCausalLM.from_pretrained(..., attn_implementation="fa_kernels")`` or
    ``model.set_attn_implementation("fa_kernels")`` use it. Attention and mask function are registered together: without
    a mask function of the same name transformers drops the padding mask. May be called again.

    Args:
        name: to register under. transformers takes every name with "flash" in it for one of its own.

    Returns:
        The name.

    Raises:
        ValueError: for a name that transformers treats differently.
        ImportError: without transformers 5.
    """
    if not name or any(part in name for part in ("flash", "/", ":", "|")) or name in ("eager", "sdpa"):
        raise bad_argument(
            "name",
            repr(name),
            "a new name without 'flash', '/', ':' and '|', which transformers reads as something else",
            f"use the default, {ATTENTION_NAME!r}",
        )
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "transformers 5 is needed: pip install 'flash-attn-models[transformers]'", name="transformers"
        ) from error
    allow_while_compiling()
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    return name
