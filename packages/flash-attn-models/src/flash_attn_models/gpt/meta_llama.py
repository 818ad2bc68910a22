"""Meta's own LLaMA files: ``params.json`` and ``consolidated.NN.pth``, one for each rank of model-parallel inference.

The models are Hugging Face's, with the same numbers in another order: rows of queries and keys are pairs of dimensions
that rotate together, and become halves here, as in Hugging Face's files, so that both load as one and the same model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flash_attn_models.checkpoint_files import WeightFile, open_weight_file, read_json
from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.state_dict import (
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)
from flash_attn_models.gpt.rotary_scaling import RotaryScaling
from flash_attn_models.parallel_checkpoint import Division, ParallelCheckpoint, numbered_files

PARAMS = "params.json"
_FILE = re.compile(r"consolidated(?:\.(\d+))?\.(?:pth|safetensors)")

_INERT = {"max_batch_size", "model_parallel_size", "max_seq_len"}
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope"),
    *("rope_scaling_factor", "multiple_of", "ffn_dim_multiplier", "hidden_dim", "head_dim", "sliding_window"),
    *_INERT,
}
_NEEDED = ("dim", "n_layers", "n_heads")
_COLUMNS = re.compile(r"attention\.wo\.weight|feed_forward\.w2\.weight")
_ROWS = re.compile(r"attention\.w[qkv]\.weight|feed_forward\.w[13]\.weight|output\.weight")


def is_meta_llama(folder: Path) -> bool:
    """Whether the folder holds a model in this form."""
    return (folder / PARAMS).is_file() and any(_FILE.fullmatch(path.name) for path in folder.iterdir())


def open_meta_llama(folder: Path) -> tuple[GPTConfig, Layout, ParallelCheckpoint]:
    """The config, the layout and the files of a model, checked, without reading a weight.

    Raises ValueError for a parameter that is unknown or missing, and for files that are missing or damaged.
    """
    params = read_json(folder / PARAMS)
    checkpoint = _open_files(folder, params)
    stored = checkpoint.tensors
    rows = stored["tok_embeddings.weight"].shape[0]
    config = config_from_params(params, vocab_size=rows, tied=_is_tied(checkpoint))
    return config, _layout(config), checkpoint


def config_from_params(params: Mapping[str, Any], *, vocab_size: int, tied: bool = False) -> GPTConfig:
    """The GPTConfig of the contents of ``params.json``.

    Two things are not in it and follow from what the published models have: the context (2048 tokens of LLaMA 1, 4096
    of LLaMA 2, 16384 of Code Llama, 8192 of LLaMA 3, 131072 from 3.1 on; 32768 of Mistral 7B, whose files have this
    form and name ``hidden_dim``), and, where ``rope_scaling_factor`` is missing, how far frequencies are rescaled (8,
    and 32 in the models of LLaMA 3.2, of width up to 3072).

    Args:
        vocab_size: rows of the embedding; older files say -1.
        tied: whether the head is the embedding.
    """
    for name in params:
        if name not in _KNOWN:
            raise bad_argument(
                f"{PARAMS} field {name!r}",
                repr(params[name]),
                f"a field of a text model in floating point{did_you_mean(name, _KNOWN)}",
                f"correct {name!r}, or remove it if it does not change the model",
            )
    for name in _NEEDED:
        if name not in params:
            raise bad_argument(f"{PARAMS} field {name!r}", "nothing", "a value", "download the file again")
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise bad_argument(
            f"{PARAMS} field 'vocab_size'",
            params["vocab_size"],
            f"{vocab_size}, the rows of tok_embeddings.weight",
            "give params.json and weights of the same model",
        )
    scaling = None
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor", 32.0 if params["dim"] <= 3072 else 8.0)
        scaling = RotaryScaling(
            kind="llama3",
            factor=float(factor),
            original_max_seqlen=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
    return GPTConfig(
        vocab_size=vocab_size,
        max_seqlen=_context(params),
        n_layer=params["n_layers"],
        n_head=params["n_heads"],
        n_head_kv=params.get("n_kv_heads"),
        d_head=params.get("head_dim"),
        d_model=params["dim"],
        d_inner=params.get("hidden_dim") or _inner_dim(params),
        norm="rms_norm",
        norm_eps=params.get("norm_eps", 1e-5),
        activation="swiglu",
        position="rotary",
        rotary_base=params.get("rope_theta", 10000.0),
        rotary_scaling=scaling,
        window=params.get("sliding_window"),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tie_embeddings=tied,
    )


def _inner_dim(params: Mapping[str, Any]) -> int:
    inner = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        inner = int(params["ffn_dim_multiplier"] * inner)
    multiple = int(params.get("multiple_of", 256))
    return multiple * -(-inner // multiple)


def _context(params: Mapping[str, Any]) -> int:
    if params.get("use_scaled_rope"):
        return 131072
    if "hidden_dim" in params:
        return 32768
    of_base = {500000.0: 8192, 1000000.0: 16384}
    base = float(params.get("rope_theta", 10000.0))
    return of_base.get(base, 2048 if params.get("norm_eps", 1e-5) < 5e-6 else 4096)


def _layout(config: GPTConfig) -> Layout:
    heads = (config.n_head, config.num_heads_kv)
    rows = tuple(count * config.head_dim for count in (*heads, heads[1]))
    qkv = tuple(f"attention.w{name}" for name in "qkv")
    per_layer = [
        *linear_entries("norm1", "attention_norm", False),
        *linear_entries("mixer.Wqkv", qkv, False, rows=rows, paired_heads=(*heads, 0)),
        *linear_entries("mixer.out_proj", "attention.wo", False),
        *linear_entries("norm2", "ffn_norm", False),
        *linear_entries(
            "mlp.fc1", ("feed_forward.w3", "feed_forward.w1"), False, rows=(config.inner_dim,) * 2
        ),
        *linear_entries("mlp.fc2", "feed_forward.w2", False),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "tok_embeddings", False),
        *layer_entries(per_layer, config.n_layer, "layers"),
        *linear_entries("transformer.ln_f", "norm", False),
    ]
    return make_layout(
        config,
        entries,
        "",
        r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs",
        head="output",
    )


def _open_files(folder: Path, params: Mapping[str, Any]) -> ParallelCheckpoint:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and int(match[1] or 0) not in found:
            found[int(match[1] or 0)] = path
    paths = numbered_files(folder, found)
    ranks: list[WeightFile] = [open_weight_file(path) for path in paths]
    first = ranks[0].tensors
    if "tok_embeddings.weight" not in first or len(first["tok_embeddings.weight"].shape) != 2:
        raise bad_argument(
            str(paths[0]), "no tok_embeddings.weight", "the weights of a LLaMA", "give the model's own folder"
        )

    def division(name: str, shape: tuple[int, ...]) -> Division:
        if len(paths) == 1:
            return Division()
        if name == "tok_embeddings.weight":  # by its columns up to LLaMA 2, by its rows from LLaMA 3 on
            return Division(0 if shape[1] == params.get("dim") else 1)
        if _COLUMNS.search(name):
            return Division(1)
        return Division(0 if _ROWS.search(name) else None)

    return ParallelCheckpoint(ranks, paths, division)


def _is_tied(checkpoint: ParallelCheckpoint) -> bool:
    """LLaMA 3.2's small models repeat their embedding as the head."""
    if "output.weight" not in checkpoint.tensors:
        return True
    head, embedding = (checkpoint.tensors[name] for name in ("output.weight", "tok_embeddings.weight"))
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    return torch.equal(checkpoint.read("output.weight"), checkpoint.read("tok_embeddings.weight"))
