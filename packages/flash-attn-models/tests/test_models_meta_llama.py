"""Meta's own LLaMA files: written here from transformers models as Meta has them, they load as the same model."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.gpt.meta_llama import config_from_params

_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BY_COLUMNS = ("wo.weight", "w2.weight")
SIZES = {"hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64}


def meta_weights(model):
    """The state dict with Meta's names, and neighbouring dimensions of a head rotating together."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, metas in _NAMES.items():
            name = name.replace(theirs, metas)
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings")
        name = name.replace("lm_head", "output")
        for kind, count in (("wq", heads["q_proj"]), ("wk", heads["k_proj"])):
            if name.endswith(f"attention.{kind}.weight"):
                half = tensor.shape[0] // count // 2
                order = [
                    head * 2 * half + i // 2 + (i % 2) * half
                    for head in range(count)
                    for i in range(2 * half)
                ]
                tensor = tensor[order]
        weights[name] = tensor.clone()
    weights["rope.freqs"] = torch.ones(6)
    return weights


def write(model, folder, parts=1, rows_of_embedding=False, **changes):
    """Files of so many ranks; the embedding by rows (LLaMA 3) or by columns (before)."""
    folder.mkdir()
    for rank in range(parts):
        part = {}
        for name, tensor in meta_weights(model).items():
            by_columns = name.endswith(_BY_COLUMNS) or (
                name.startswith("tok_embeddings") and not rows_of_embedding
            )
            if tensor.ndim == 2:
                tensor = tensor.chunk(parts, dim=int(by_columns))[rank].clone()
            part[name] = tensor
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    config = model.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": 64,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        "rope_theta": config.rope_parameters["rope_theta"],
        **changes,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture
def hf_llama(make_hf_model):
    def make(**changes):
        return make_hf_model("llama", {**SIZES, "vocab_size": 132, "num_key_value_heads": 2, **changes})

    return make


@pytest.mark.parametrize("rows_of_embedding", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_loads_as_the_hugging_face_model(hf_llama, tmp_path, parts, rows_of_embedding):
    hf_model = hf_llama()
    folder = write(hf_model, tmp_path / "meta", parts, rows_of_embedding)
    model = load_pretrained(folder)
    hf_model.save_pretrained(tmp_path / "hf")
    expected = load_pretrained(tmp_path / "hf").state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    input_ids = torch.randint(132, (2, 17))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4
    save_pretrained(model, tmp_path / "back")
    for name, tensor in load_pretrained(tmp_path / "back").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_head_that_repeats_the_embedding_is_tied(hf_llama, tmp_path):
    hf_model = hf_llama(tie_word_embeddings=True)
    model = load_pretrained(write(hf_model, tmp_path / "meta", 2))
    assert model.config.tie_embeddings
    input_ids = torch.randint(132, (2, 9))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4


def test_rescaled_frequencies(hf_llama, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf_model = hf_llama(rope_parameters=rope, max_position_embeddings=131072)
    model = load_pretrained(write(hf_model, tmp_path / "meta", use_scaled_rope=True))
    assert model.config.max_seqlen == 131072
    input_ids = torch.randint(132, (1, 40))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4


def test_files_of_mistral_have_this_form(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "vocab_size": 132, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
    hf_config = transformers.MistralConfig(**sizes, sliding_window=5, initializer_range=0.3)
    hf_model = transformers.MistralForCausalLM(hf_config).eval()
    form = {"head_dim": 16, "hidden_dim": 128, "sliding_window": 5, "vocab_size": 132}
    model = load_pretrained(write(hf_model, tmp_path / "mistral", **form))
    assert (model.config.window, model.config.max_seqlen) == (5, 32768)
    input_ids = torch.randint(132, (2, 17))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4


PUBLISHED = {  # (params.json, inner width, context, frequencies rescaled by)
    "llama-7b": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6}, 11008, 2048, None),
    "llama-2-70b": (
        {
            "dim": 8192,
            "n_layers": 80,
            "n_heads": 64,
            "n_kv_heads": 8,
            "norm_eps": 1e-5,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
        },
        28672,
        4096,
        None,
    ),
    "llama-3-8b": (
        {
            "dim": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 8,
            "norm_eps": 1e-5,
            "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3,
            "rope_theta": 500000.0,
        },
        14336,
        8192,
        None,
    ),
    "llama-3.1-8b": (
        {
            "dim": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 8,
            "norm_eps": 1e-5,
            "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
        },
        14336,
        131072,
        8.0,
    ),
    "mistral-7b-v0.1": (
        {
            "dim": 4096,
            "n_layers": 32,
            "head_dim": 128,
            "hidden_dim": 14336,
            "n_heads": 32,
            "n_kv_heads": 8,
            "norm_eps": 1e-5,
            "sliding_window": 4096,
            "vocab_size": 32000,
        },
        14336,
        32768,
        None,
    ),
    "llama-3.2-1b": (
        {
            "dim": 2048,
            "n_layers": 16,
            "n_heads": 32,
            "n_kv_heads": 8,
            "norm_eps": 1e-5,
            "multiple_of": 256,
            "ffn_dim_multiplier": 1.5,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
        },
        8192,
        131072,
        32.0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    params, inner, context, factor = PUBLISHED[name]
    config = config_from_params(params, vocab_size=32000)
    assert (config.inner_dim, config.max_seqlen) == (inner, context)
    assert (config.rotary_scaling.factor if config.rotary_scaling else None) == factor


def test_what_is_wrong_is_named(hf_llama, tmp_path):
    hf_model = hf_llama()
    for changes, message in (
        ({"quantization_args": {}}, "params.json field 'quantization_args'"),
        ({"n_kv_head": 2}, "did you mean 'n_kv_heads'"),
        ({"vocab_size": 99}, "params.json field 'vocab_size': got 99; expected 132"),
        ({"n_layers": 3}, r"missing layers\.2\.attention_norm\.weight"),
        ({"multiple_of": 256}, r"feed_forward\.w3\.weight \(128, 48\) instead of \(256, 48\)"),
    ):
        folder = write(hf_model, tmp_path / str(changes), **changes)
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)
    folder = write(hf_model, tmp_path / "parts", 2)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 parts, without number 0"):
        load_pretrained(folder)
    folder = write(hf_model, tmp_path / "mixed", 2)
    part = torch.load(folder / "consolidated.01.pth")
    part["norm.weight"] = part["norm.weight"][:-1].clone()
    torch.save(part, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated.01.pth: got norm.weight \(47,\)"):
        load_pretrained(folder)
    (folder / "consolidated.01.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"consolidated.01.pth: got a file that cannot be read"):
        load_pretrained(folder)
