"""Megatron-LM's checkpoints: written here from transformers models in the order of each version, they load as the same
model; and what we write is read back."""

from __future__ import annotations

import argparse
import enum
import sys
import types
from itertools import chain

import numpy as np
import pytest
import torch
from flash_attn_models import GPTConfig, GPTLMHeadModel, load_pretrained
from flash_attn_models.gpt.megatron import save_megatron

_GPT2 = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attention.query_key_value",
    "attn.c_proj": "self_attention.dense",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
}


def qkv_rows(heads, width, version, groups=None):
    """Megatron-LM's order of the rows of [q | k | v]: for each of its rows, which of ours it is."""
    q = [[head * width + i for i in range(width)] for head in range(heads)]
    groups = heads if groups is None else groups
    k = [[heads * width + group * width + i for i in range(width)] for group in range(groups)]
    v = [[(heads + groups) * width + group * width + i for i in range(width)] for group in range(groups)]
    if version == 0:
        return list(chain(*q, *k, *v))
    if version == 1:
        return [
            row for head in range(heads) for i in range(width) for row in (q[head][i], k[head][i], v[head][i])
        ]
    ratio = heads // groups
    order = []
    for group in range(groups):
        order += chain(*q[group * ratio : (group + 1) * ratio], k[group], v[group])
    return order


def divided(tensor, name, ranks, rank, version, gated=False):
    """The part of a rank of tensor parallelism."""
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(ranks, dim=1)[rank]
    if "query_key_value" in name and version == 0:
        return torch.cat([part.chunk(ranks)[rank] for part in tensor.chunk(3)])
    if "dense_h_to_4h" in name and gated:
        return torch.cat([part.chunk(ranks)[rank] for part in tensor.chunk(2)])
    if "query_key_value" in name or "dense_h_to_4h" in name:
        return tensor.chunk(ranks)[rank]
    if name.endswith("word_embeddings.weight") or name.startswith("output_layer"):
        return tensor.chunk(ranks)[rank]
    return tensor


def store(
    folder, embedding, decoder, head, args, version, ranks, decoder_name="encoder", gated=False, extra=None
):
    for rank in range(ranks):
        part = {
            name: {
                kind: divided(tensor, f"{name}.{kind}", ranks, rank, version).clone()
                for kind, tensor in tensors.items()
            }
            for name, tensors in embedding.items()
        }
        model = {
            "embedding": part,
            decoder_name: {
                name: divided(tensor, name, ranks, rank, version, gated).clone()
                for name, tensor in decoder.items()
            },
        }
        if head is not None:
            model["output_layer"] = {"weight": head.chunk(ranks)[rank].clone()}
        stored = {
            "args": argparse.Namespace(**args),
            "model": {"language_model": model},
            "optimizer": {"step": 3},
            **(extra or {}),
        }
        if version > 0:
            stored["checkpoint_version"] = float(version)
        place = folder / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        torch.save(stored, place / "model_optim_rng.pt")
    return folder


def write_gpt2(hf_model, folder, version=3, ranks=1, padding=0, old_names=False, changes=None, extra=None):
    """A GPT-2 as Megatron-LM keeps it."""
    config = hf_model.config
    width = config.n_embd // config.n_head
    order = qkv_rows(config.n_head, width, version)
    decoder, embedding = {}, {}
    for name, tensor in hf_model.transformer.state_dict().items():
        if name.startswith("h."):
            for theirs, megatrons in _GPT2.items():
                name = name.replace(f".{theirs}.", f".{megatrons}.")
            if tensor.ndim == 2:
                tensor = tensor.t()
            if "query_key_value" in name:
                tensor = tensor[order]
            name = name.replace("h.", "layers.", 1)
            decoder[name.replace("self_attention", "attention") if old_names else name] = tensor
        elif name.startswith("ln_f"):
            decoder[name.replace("ln_f", "final_layernorm")] = tensor
        else:
            kind = {"wte": "word_embeddings", "wpe": "position_embeddings"}[name.split(".")[0]]
            embedding[kind] = {"weight": tensor}
    rows = torch.randn(padding, config.n_embd)
    embedding["word_embeddings"]["weight"] = torch.cat([embedding["word_embeddings"]["weight"], rows])
    args = {
        "num_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "padded_vocab_size": config.vocab_size + padding,
        "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.layer_norm_epsilon,
        "bias_gelu_fusion": True,
        "tensor_model_parallel_size": ranks,
        **(changes or {}),
    }
    decoder_name = "transformer" if old_names else "encoder"
    return store(folder, embedding, decoder, None, args, version, ranks, decoder_name, extra=extra)


def write_llama(hf_model, folder, ranks):
    """A LLaMA as Megatron-LM keeps it: grouped queries, gate before value, an untied head, no biases."""
    config, weights = hf_model.config, hf_model.state_dict()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    order = qkv_rows(heads, config.hidden_size // heads, 3, groups)
    decoder = {"final_layernorm.weight": weights["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        of = f"model.layers.{layer}"
        qkv = torch.cat([weights[f"{of}.self_attn.{name}_proj.weight"] for name in "qkv"])
        gate_up = [weights[f"{of}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        parts = {
            "input_layernorm": weights[f"{of}.input_layernorm.weight"],
            "post_attention_layernorm": weights[f"{of}.post_attention_layernorm.weight"],
            "self_attention.query_key_value": qkv[order],
            "self_attention.dense": weights[f"{of}.self_attn.o_proj.weight"],
            "mlp.dense_h_to_4h": torch.cat(gate_up),
            "mlp.dense_4h_to_h": weights[f"{of}.mlp.down_proj.weight"],
        }
        decoder |= {f"layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    args = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "ffn_hidden_size": config.intermediate_size,
        "max_position_embeddings": 64,
        "norm_epsilon": config.rms_norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "vocab_size": None,
    }
    embedding = {"word_embeddings": {"weight": weights["model.embed_tokens.weight"]}}
    return store(folder, embedding, decoder, weights["lm_head.weight"], args, 3, ranks, gated=True)


def agree(model, hf_model, vocab_size):
    input_ids = torch.randint(vocab_size, (2, 17))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version(make_hf_model, tmp_path, version, ranks):
    hf_model = make_hf_model("gpt2", {})
    folder = write_gpt2(hf_model, tmp_path / "m", version, ranks, padding=5, old_names=version < 2)
    model = load_pretrained(folder)
    assert model.config.vocab_size == 131
    agree(model, hf_model, 131)


def test_exact_gelu_without_fusion(make_hf_model, tmp_path):
    hf_model = make_hf_model("gpt2", {"activation_function": "gelu"})
    changes = {"bias_gelu_fusion": False, "vocab_size": None}
    model = load_pretrained(write_gpt2(hf_model, tmp_path / "m", changes=changes))
    assert model.config.activation == "gelu"
    agree(model, hf_model, 131)


@pytest.mark.parametrize("ranks", [1, 2])
def test_llama(make_hf_model, tmp_path, ranks):
    hf_model = make_hf_model("llama", {"num_key_value_heads": 2, "vocab_size": 132})
    model = load_pretrained(write_llama(hf_model, tmp_path / "m", ranks))
    agree(model, hf_model, 132)


def test_a_run_names_its_last_iteration(make_hf_model, tmp_path):
    hf_model = make_hf_model("gpt2", {})
    write_gpt2(hf_model, tmp_path / "run" / "iter_0000100")
    latest = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    latest.write_text("100\n")
    agree(load_pretrained(tmp_path / "run"), hf_model, 131)
    latest.write_text("200\n")
    with pytest.raises(ValueError, match="expected an iteration that is there, as folder iter_0000200"):
        load_pretrained(tmp_path / "run")


def test_objects_of_other_code_are_not_loaded(make_hf_model, tmp_path, monkeypatch):
    """Neither Megatron-LM's enumerations nor numpy's random state keep a model from loading, and no code runs."""
    module = types.ModuleType("megatron.core.enums")
    ModelType = enum.Enum("ModelType", ["encoder"], module="megatron.core.enums", qualname="ModelType")
    module.ModelType = ModelType
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    hf_model = make_hf_model("gpt2", {})
    extra = {"rng_state": [{"np_rng_state": np.random.get_state()}]}
    folder = write_gpt2(
        hf_model,
        tmp_path / "m",
        changes={"model_type": ModelType.encoder, "dtype": torch.float16},
        extra=extra,
    )
    for name in ("megatron.core.enums", "megatron.core", "megatron"):
        monkeypatch.delitem(sys.modules, name)
    agree(load_pretrained(folder), hf_model, 131)
    folder = write_gpt2(hf_model, tmp_path / "bad", extra={"x": pytest.approx})
    with pytest.raises(ValueError, match=r"model_optim_rng.pt: got a file that cannot be read"):
        load_pretrained(folder)


CONFIGS = {
    "gpt2": {},
    "llama": {
        "activation": "swiglu",
        "norm": "rms_norm",
        "position": "rotary",
        "rotary_dim": 4,
        "n_head_kv": 2,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tie_embeddings": False,
        "window": 7,
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_again(tmp_path, kind):
    config = GPTConfig(vocab_size=131, max_seqlen=40, n_layer=2, n_head=4, d_model=48, **CONFIGS[kind])
    model = GPTLMHeadModel(config)
    save_megatron(model, tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    assert (loaded.config.window, loaded.config.num_rotary_dims) == (config.window, config.num_rotary_dims)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    ids = torch.randint(131, (2, 9))
    assert torch.equal(model.eval()(ids), loaded(ids))
    with pytest.raises(ValueError, match=r"folder: got .*; expected a folder that is empty"):
        save_megatron(model, tmp_path / "m")


def test_what_megatron_does_not_have_is_named(tmp_path):
    config = GPTConfig(
        vocab_size=9, max_seqlen=8, n_layer=1, n_head=2, d_model=8, position="alibi", softcap=2.0
    )
    with pytest.raises(ValueError, match=r"config: got position='alibi', softcap=2.0"):
        save_megatron(GPTLMHeadModel(config), tmp_path / "m")
    with pytest.raises(ValueError, match="model: got a Sequential; expected a GPTLMHeadModel"):
        save_megatron(torch.nn.Sequential(GPTLMHeadModel(config)), tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_what_is_wrong_is_named(make_hf_model, tmp_path):
    hf_model = make_hf_model("gpt2", {})
    for number, (changes, message) in enumerate(
        (
            ({"num_experts": 4}, "Megatron-LM argument 'num_experts': got 4; expected None or 1"),
            (
                {"normalization": "odd"},
                "argument 'normalization': got 'odd'; expected 'LayerNorm' or 'RMSNorm'",
            ),
            ({"hidden_size": None}, "argument 'hidden_size': got nothing"),
            ({"num_layers": 3}, r"missing language_model\.encoder\.layers\.2\.input_layernorm\.weight"),
            ({"window_size": (4, 4)}, "argument 'window_size'"),
        )
    ):
        folder = write_gpt2(hf_model, tmp_path / str(number), changes=changes)
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)
    folder = write_gpt2(hf_model, tmp_path / "parts", ranks=2)
    (folder / "mp_rank_00").rename(folder / "mp_rank_02")
    with pytest.raises(ValueError, match="2 of 3 parts, without number 0"):
        load_pretrained(folder)
    folder = write_gpt2(hf_model, tmp_path / "pipeline")
    (folder / "mp_rank_00").rename(folder / "mp_rank_00_001")
    with pytest.raises(ValueError, match="a part of pipeline parallelism"):
        load_pretrained(folder)
    folder = tmp_path / "core" / "mp_rank_00"
    folder.mkdir(parents=True)
    core = {"args": argparse.Namespace(), "model": {"embedding.word_embeddings.weight": torch.ones(2, 2)}}
    torch.save(core, folder / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="convert a checkpoint of Megatron Core"):
        load_pretrained(folder.parent)
    torch.save({"model": {}}, folder / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="got no 'args'"):
        load_pretrained(folder.parent)
