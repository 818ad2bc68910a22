"""Our attention, norms, gated MLPs and loss inside models of transformers.

Needs ``transformers`` (``pip install 'flash-attn-models[transformers]'``), which is imported when a function here is
called. Nothing here changes transformers itself: attention is registered under a name of its own, and the ``replace``
functions change the one model that they are given.
"""

from flash_attn_models.transformers_integration.register import ATTENTION_NAME, register_with_transformers
from flash_attn_models.transformers_integration.replace import (
    Replacement,
    replace_loss,
    replace_mlps,
    replace_norms,
)

__all__ = [
    "ATTENTION_NAME",
    "Replacement",
    "register_with_transformers",
    "replace_loss",
    "replace_mlps",
    "replace_norms",
]
