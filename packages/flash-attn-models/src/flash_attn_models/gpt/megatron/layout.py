"""The tensors of Megatron-LM's GPT, over the versions of its checkpoints.

Its query/key/value projection has rows in an order that the version decides: [q | k | v] (0), each row of a head three
times (1), each head three times (2 and later; with grouped queries a group after the other).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.state_dict import (
    Interleaved,
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)
from flash_attn_models.parallel_checkpoint import Division

LATEST_VERSION = 3.0
ROOT = "language_model"
EMBEDDING = f"{ROOT}.embedding.word_embeddings.weight"
HEAD = f"{ROOT}.output_layer.weight"

_BUFFERS = r".*(_extra_state|\.inv_freq|attention\.bias|masked_bias)|word_embeddings_for_head\.weight"
_ROWS = re.compile(
    r"query_key_value\.(weight|bias)|dense_h_to_4h\.(weight|bias)|(word_embeddings|output_layer)\.weight"
)
_COLUMNS = re.compile(r"attention\.dense\.weight|dense_4h_to_h\.weight")


@dataclass(frozen=True)
class Names:
    """What parts of the names depend on the age of the code that wrote them.

    Attributes:
        decoder: "encoder" or, before, "transformer".
        attention: "self_attention" or, before, "attention".
    """

    decoder: str = "encoder"
    attention: str = "self_attention"

    @classmethod
    def of(cls, names: Collection[str]) -> Names:
        """Those of a checkpoint with tensors of these names."""
        old = any(name.startswith(f"{ROOT}.transformer.") for name in names)
        plain = any(re.search(r"\.layers\.\d+\.attention\.", name) for name in names)
        return cls("transformer" if old else "encoder", "attention" if plain else "self_attention")


def megatron_layout(
    config: GPTConfig, *, version: float = LATEST_VERSION, padding: int = 0, names: Names | None = None
) -> Layout:
    """The tensors of a checkpoint of this config, joined over the ranks of tensor parallelism.

    Args:
        version: ``checkpoint_version`` of the file.
        padding: rows of the embedding behind those of the vocabulary.
        names: None is what the latest code writes.
    """
    names = Names() if names is None else names
    bias = config.mlp_bias
    has_shift = config.norm == "layer_norm"
    attention, gated = names.attention, config.activation == "swiglu"
    per_layer = [
        *linear_entries("norm1", "input_layernorm", has_shift),
        *linear_entries(
            "mixer.Wqkv", f"{attention}.query_key_value", bias, interleaved=_interleaved(config, version)
        ),
        *linear_entries("mixer.out_proj", f"{attention}.dense", bias),
        *linear_entries("norm2", "post_attention_layernorm", has_shift),
        # Theirs has the gate first.
        *linear_entries("mlp.fc1", "mlp.dense_h_to_4h", bias, swap_halves=gated),
        *linear_entries("mlp.fc2", "mlp.dense_4h_to_h", bias),
    ]
    embeddings = f"{ROOT}.embedding"
    entries = linear_entries(
        "transformer.embeddings.word_embeddings", f"{embeddings}.word_embeddings", False, padding=padding
    )
    if config.position == "learned":
        entries += linear_entries(
            "transformer.embeddings.position_embeddings", f"{embeddings}.position_embeddings", False
        )
    entries += layer_entries(per_layer, config.n_layer, f"{ROOT}.{names.decoder}.layers")
    entries += linear_entries("transformer.ln_f", f"{ROOT}.{names.decoder}.final_layernorm", has_shift)
    return make_layout(config, entries, "", _BUFFERS, head=f"{ROOT}.output_layer", head_padding=padding)


def division(name: str, *, version: float, gated: bool) -> Division:
    """How tensor parallelism divides the tensor of this name."""
    if _COLUMNS.search(name):
        return Division(1)
    if not _ROWS.search(name):
        return Division()
    if "dense_h_to_4h" in name:
        return Division(0, 2 if gated else 1)
    return Division(0, 3 if "query_key_value" in name and version < 1 else 1)


def _interleaved(config: GPTConfig, version: float) -> Interleaved | None:
    if version < 1:
        return None
    if version < 2:
        return Interleaved(config.n_head * config.head_dim, 1, 1)
    return Interleaved.of(config)
