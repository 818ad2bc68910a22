"""Hugging Face folders: all forms of weight files load, damaged ones are named, saving is exact."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from flash_attn_models import GPTConfig, GPTLMHeadModel, load_pretrained, save_pretrained

safetensors_torch = pytest.importorskip("safetensors.torch")


def write(hf_model, folder, form):
    """Save a transformers model as "safetensors", "bin", or "sharded ..." of these, or "old bin"."""
    folder.mkdir()
    if "safetensors" in form:
        hf_model.save_pretrained(folder, max_shard_size="40KB" if "sharded" in form else "1GB")
    else:
        hf_model.config.save_pretrained(folder)
        weights = dict(hf_model.state_dict())
        if "sharded" in form:
            names = list(weights)
            parts = [names[::2], names[1::2]]
            weight_map = {}
            for number, part in enumerate(parts, start=1):
                file_name = f"pytorch_model-{number:05d}-of-00002.bin"
                torch.save({name: weights[name] for name in part}, folder / file_name)
                weight_map |= dict.fromkeys(part, file_name)
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(
                weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization="old" not in form
            )
    return folder


FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "old bin"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_form_of_weights_loads(make_hf_model, tmp_path, kind, form):
    hf_model = make_hf_model(kind, {})
    folder = write(hf_model, tmp_path / "model", form)
    assert ("sharded" in form) == any(folder.glob("*.index.json"))
    model = load_pretrained(folder)
    assert not model.training
    input_ids = torch.randint(131, (2, 17))
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4
    for path in folder.iterdir():  # the model does not depend on the files any more
        path.unlink()
    with torch.no_grad():
        assert (model(input_ids) - hf_model(input_ids).logits).abs().max() < 1e-4


def test_loaded_weights_own_their_memory(make_hf_model, tmp_path):
    model = load_pretrained(write(make_hf_model("llama", {}), tmp_path / "model", "safetensors"))
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.requires_grad, name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert sum(1 for _ in model.parameters()) == len(model.state_dict())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_special_tokens_of_generation(make_hf_model, tmp_path):
    folder = write(make_hf_model("llama", {}), tmp_path / "model", "safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "bos_token_id": 1, "eos_token_id": 3}))
    settings = {"eos_token_id": [3, 7], "pad_token_id": 5, "bos_token_id": None, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = load_pretrained(folder).config
    assert config.eos_token_ids == (3, 7) and config.pad_token_id == 5
    assert config.bos_token_id == 1
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_argument_converts(make_hf_model, tmp_path, dtype):
    folder = write(make_hf_model("gpt2", {}), tmp_path / "model", "safetensors")
    stored, converted = load_pretrained(folder), load_pretrained(folder, dtype=dtype)
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, stored.state_dict()[name].to(dtype)), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn, 16])
def test_what_is_no_dtype_of_weights_is_refused_first(tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"dtype: got {dtype!r}; expected a torch.dtype of at least 16-bit"):
        load_pretrained(tmp_path, dtype=dtype)


def test_default_dtype_is_the_stored_one(make_hf_model, tmp_path):
    folder = write(make_hf_model("llama", {}).bfloat16(), tmp_path / "model", "safetensors")
    assert load_pretrained(folder).head_weight.dtype == torch.bfloat16
    rewrite(
        folder, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].float()})
    )
    with pytest.raises(
        ValueError, match=r"dtype: got None for weights in .* of torch.bfloat16, torch.float32"
    ):
        load_pretrained(folder)
    assert load_pretrained(folder, dtype=torch.float32).head_weight.dtype == torch.float32


def test_device_argument(make_hf_model, tmp_path):
    folder = write(make_hf_model("llama", {}), tmp_path / "model", "safetensors")
    assert load_pretrained(folder, device="meta").head_weight.is_meta
    with torch.device("meta"):
        assert load_pretrained(folder).head_weight.is_meta


def test_saved_folder_loads_in_transformers_bit_for_bit(hf_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = load_pretrained(write(hf_model, tmp_path / "theirs", "safetensors"))
    save_pretrained(model, tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.state_dict().keys() == hf_model.state_dict().keys()
    for name, tensor in hf_model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    input_ids = torch.randint(model.config.vocab_size, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(
            back.eval()(input_ids).logits, hf_model(input_ids).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000, 1])
def test_saved_folder_loads_here_bit_for_bit(tmp_path, max_shard_bytes):
    config = GPTConfig(
        vocab_size=131, max_seqlen=40, n_layer=2, n_head=3, d_model=48, eos_token_id=(3, 4), dropout=0.1
    )
    model = GPTLMHeadModel(config, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "new" / "model", max_shard_bytes=max_shard_bytes)
    loaded = load_pretrained(tmp_path / "new" / "model")
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    files = list((tmp_path / "new" / "model").glob("*.safetensors"))
    assert (
        [path.name for path in files] == ["model.safetensors"] if max_shard_bytes == 10**9 else len(files) > 1
    )
    if max_shard_bytes == 30_000:
        assert max(path.stat().st_size for path in files) < 31_000  # with the header


def test_weights_tied_by_hand_are_saved_under_both_names(tmp_path):
    config = GPTConfig(vocab_size=31, max_seqlen=8, n_layer=1, n_head=2, d_model=8, tie_embeddings=False)
    model = GPTLMHeadModel(config)
    model.lm_head.weight = model.transformer.embeddings.word_embeddings.weight
    save_pretrained(model, tmp_path / "model")
    again = load_pretrained(tmp_path / "model")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.transformer.embeddings.word_embeddings.weight, model.lm_head.weight)


def test_saving_leaves_nothing_behind_and_overwrites_nothing(tmp_path, monkeypatch):
    model = GPTLMHeadModel(GPTConfig(vocab_size=31, max_seqlen=8, n_layer=1, n_head=1, d_model=8))
    (tmp_path / "empty").mkdir()
    save_pretrained(model, tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"folder: got .*full; expected a folder that is empty or does not exist yet"
    ):
        save_pretrained(model, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"folder: got .*file"):
        save_pretrained(model, tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"folder: got .*file/model \(.*\); expected a place that can be written to"
    ):
        save_pretrained(model, tmp_path / "file" / "model")

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors_torch, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "late")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_saving_refuses_what_it_cannot_express(tmp_path):
    config = GPTConfig(vocab_size=31, max_seqlen=8, n_layer=1, n_head=2, d_model=8, out_bias=False)
    with pytest.raises(
        ValueError, match=r"config: got out_bias=False; expected what Hugging Face's 'gpt2' has"
    ):
        save_pretrained(GPTLMHeadModel(config), tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: got a Sequential; expected a GPTLMHeadModel"):
        save_pretrained(torch.nn.Sequential(GPTLMHeadModel(config)), tmp_path / "model")
    with pytest.raises(ValueError, match=r"max_shard_bytes: got 0; expected at least 1"):
        save_pretrained(GPTLMHeadModel(config), tmp_path / "model", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"max_shard_bytes: got '5GB'; expected at least 1"):
        save_pretrained(GPTLMHeadModel(config), tmp_path / "model", max_shard_bytes="5GB")
    assert not any(tmp_path.iterdir())


def rewrite(folder, change):
    """Change the tensors of model.safetensors."""
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors_torch.save_file(weights, folder / "model.safetensors")


@pytest.fixture
def gpt2_folder(make_hf_model, tmp_path):
    return write(make_hf_model("gpt2", {}), tmp_path / "model", "safetensors")


@pytest.fixture
def llama_folder(make_hf_model, tmp_path):
    return write(make_hf_model("llama", {}), tmp_path / "model", "safetensors")


def test_names_without_the_base_prefix_load(gpt2_folder):
    expected = load_pretrained(gpt2_folder).state_dict()

    def strip(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    rewrite(gpt2_folder, strip)
    loaded = load_pretrained(gpt2_folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_buffers_of_old_checkpoints_are_ignored(gpt2_folder):
    expected = load_pretrained(gpt2_folder).state_dict()
    buffers = {
        "transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    rewrite(gpt2_folder, lambda weights: weights.update(buffers))
    loaded = load_pretrained(gpt2_folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_rotary_frequencies_of_old_checkpoints_are_ignored(llama_folder):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    rewrite(llama_folder, lambda weights: weights.update(buffers))
    load_pretrained(llama_folder)


def test_a_repeated_tied_head_must_be_the_embedding(gpt2_folder):
    rewrite(gpt2_folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    load_pretrained(gpt2_folder)
    rewrite(gpt2_folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight that differs from transformer.wte.weight"):
        load_pretrained(gpt2_folder)


def test_missing_and_unexpected_names_are_listed_with_the_closest(llama_folder):
    def rename(weights):
        weights["model.layers.1.self_attn.k_projection.weight"] = weights.pop(
            "model.layers.1.self_attn.k_proj.weight"
        )

    rewrite(llama_folder, rename)
    with pytest.raises(ValueError) as error:
        load_pretrained(llama_folder)
    message = str(error.value)
    closest = "(did you mean 'model.layers.1.self_attn.k_projection.weight'?)"
    assert str(llama_folder) in message
    assert f"missing model.layers.1.self_attn.k_proj.weight {closest}" in message
    assert "unexpected model.layers.1.self_attn.k_projection.weight" in message


def test_a_model_with_another_depth_is_refused(llama_folder):
    fields = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing model.layers.2.input_layernorm.weight.* and 1 more"):
        load_pretrained(llama_folder)
    (llama_folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"unexpected model.layers.1"):
        load_pretrained(llama_folder)
    (llama_folder / "config.json").write_text(json.dumps({**fields, "attention_bias": True}))
    with pytest.raises(ValueError, match=r"missing model.layers.0.self_attn.q_proj.bias"):
        load_pretrained(llama_folder)


def test_a_missing_head_is_refused(llama_folder):
    rewrite(llama_folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing lm_head.weight; expected exactly the tensors"):
        load_pretrained(llama_folder)


def test_wrong_shapes_are_listed(gpt2_folder):
    fields = json.loads((gpt2_folder / "config.json").read_text())
    (gpt2_folder / "config.json").write_text(json.dumps({**fields, "vocab_size": 132, "n_inner": 100}))
    with pytest.raises(ValueError) as error:
        load_pretrained(gpt2_folder)
    assert "transformer.wte.weight (131, 48) instead of (132, 48)" in str(error.value)
    assert "transformer.h.0.mlp.c_fc.weight (48, 192) instead of (48, 100)" in str(error.value)


def test_integer_weights_are_refused(gpt2_folder):
    rewrite(
        gpt2_folder,
        lambda w: w.update({"transformer.wte.weight": w["transformer.wte.weight"].to(torch.int8)}),
    )
    with pytest.raises(
        ValueError, match=r"transformer.wte.weight of torch.int8 instead of at least 16-bit floating point"
    ):
        load_pretrained(gpt2_folder)


@pytest.mark.parametrize("dtype", [torch.uint32, torch.complex64, torch.float8_e8m0fnu])
def test_quantised_weights_are_refused_as_such_and_not_as_damaged(gpt2_folder, dtype):
    rewrite(
        gpt2_folder,
        lambda w: w.update({"transformer.wte.weight": torch.zeros(131, 48).to(torch.float32).to(dtype)}),
    )
    with pytest.raises(ValueError, match=rf"transformer.wte.weight of {dtype} instead of .*not quantised"):
        load_pretrained(gpt2_folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(make_hf_model, tmp_path, form, keep):
    folder = write(make_hf_model("gpt2", {}), tmp_path / "model", form)
    victim = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(
        ValueError, match=rf"{victim.name}: got a file that cannot be read .*expected a complete"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_something_else_is_named(gpt2_folder, name):
    (gpt2_folder / "model.safetensors").unlink()
    for content in (
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x00" * 4096,
        pickle.dumps(["no", "tensors"]),
    ):
        (gpt2_folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: got a file that cannot be read"):
            load_pretrained(gpt2_folder)


class Attack:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran code from a weight file')",))


def test_a_bin_file_cannot_run_code(gpt2_folder):
    (gpt2_folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Attack()}, gpt2_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: got a file that cannot be read"):
        load_pretrained(gpt2_folder)


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_a_missing_or_wrong_shard_is_named(make_hf_model, tmp_path, form):
    folder = write(make_hf_model("llama", {}), tmp_path / "model", form)
    index = next(folder.glob("*.index.json"))
    listed = json.loads(index.read_text())
    shards = sorted(set(listed["weight_map"].values()))
    (folder / shards[1]).rename(folder / "aside")
    with pytest.raises(ValueError, match=rf"{index.name}: got no file {shards[1]}; expected every shard"):
        load_pretrained(folder)
    (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
    with pytest.raises(ValueError, match=rf"{shards[1]}: got other tensors than {index.name} lists"):
        load_pretrained(folder)
    index.write_text(index.read_text()[:-20])
    with pytest.raises(ValueError, match=rf"{index.name}: got a file that cannot be read"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(ValueError, match=rf"{index.name}: got no usable 'weight_map'"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(
        ValueError, match=rf"{index.name}: got shard '../model.safetensors'; expected names of files in"
    ):
        load_pretrained(folder)


def test_missing_parts_of_a_folder(gpt2_folder, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"folder: got .*nowhere; expected a local folder with config.json.*snapshot_download",
    ):
        load_pretrained(tmp_path / "nowhere")
    (gpt2_folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"folder: got .* with config.json.*; expected weights in model.safetensors or"
    ):
        load_pretrained(gpt2_folder)
    (gpt2_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: got a file that cannot be read"):
        load_pretrained(gpt2_folder)
    (gpt2_folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: got a JSON list; expected a JSON object"):
        load_pretrained(gpt2_folder)
