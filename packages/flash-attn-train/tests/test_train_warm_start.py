"""Starting from weights of earlier runs and of Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_models import save_pretrained
from flash_attn_models.bert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.vit import ViTConfig, ViTForImageClassification, ViTModel, interpolate_positions
from flash_attn_train.distributed.checkpoint_folder import write_checkpoint_folder
from flash_attn_train.errors import CheckpointError
from flash_attn_train.restore import restore
from flash_attn_train.sequence_classifier import BertForSequenceClassification
from flash_attn_train.warm_start import check_warm_start, load_warm_start
from safetensors.torch import load_file, save_file
from torch import nn

SIZES = {"vocab_size": 40, "max_seqlen": 8, "n_layer": 1, "n_head": 2, "d_model": 16}
IMAGES = {"image_size": 8, "patch_size": 4, "n_layer": 1, "n_head": 2, "d_model": 16, "n_classes": 3}


def gpt(**changes: Any) -> GPTLMHeadModel:
    return GPTLMHeadModel(GPTConfig(**{**SIZES, **changes}))


def vit(**changes: Any) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**{**IMAGES, **changes}))


def equal(model: nn.Module, other: nn.Module, *, prefix: str = "") -> bool:
    own = model.state_dict()
    return all(torch.equal(own[prefix + name], tensor) for name, tensor in other.state_dict().items())


def write_checkpoint(path: Path, model: nn.Module, **more: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "global_step": 3, **more}, path)
    return str(path)


class TestOwnCheckpoints:
    def test_file_and_run_folder(self, tmp_path: Path) -> None:
        source = gpt()
        path = write_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", source)
        for where in (path, str(tmp_path / "run")):
            model = gpt()
            assert load_warm_start(model, where) == []
            assert equal(model, source)

    def test_averaged_weights_unless_the_trained_ones_are_wanted(self, tmp_path: Path) -> None:
        averaged, trained = gpt(), gpt()
        averages = {f"model.{name}": tensor for name, tensor in averaged.named_parameters()}
        path = write_checkpoint(tmp_path / "a.ckpt", trained, ema_state_dict=averages)
        model = gpt()
        load_warm_start(model, path)
        assert equal(model, averaged)
        load_warm_start(model, path, use_ema=False)
        assert equal(model, trained)

    def test_names_that_wrappers_changed(self, tmp_path: Path) -> None:
        source = gpt()
        weights = {
            f"model.{name.replace('layers.0.', 'layers.0._orig_mod.')}": tensor
            for name, tensor in source.state_dict().items()
        }
        torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
        model = gpt()
        load_warm_start(model, str(tmp_path / "a.ckpt"))
        assert equal(model, source)

    def test_folder_of_many_ranks_is_checked_without_reading_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = gpt()
        weights = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
        averages = {name: tensor for name, tensor in weights.items() if "lm_head" not in name}
        path = tmp_path / "many"  # any name will do
        write_checkpoint_folder(path, {"state_dict": weights, "ema_state_dict": averages}, [])
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.checkpoint.load", None)
            check_warm_start(gpt(), str(path))
            with pytest.raises(CheckpointError, match=r"\(40, 16\) instead of \(40, 32\)"):
                check_warm_start(gpt(d_model=32), str(path))
        model = gpt()
        assert load_warm_start(model, str(path)) == []
        assert equal(model, source)

    def test_another_architecture_of_equal_shapes_is_refused(self, tmp_path: Path) -> None:
        config = {"model.n_head": 2, "model.activation": "relu", "model.dropout": 0.3, "trainer.max_steps": 3}
        path = write_checkpoint(tmp_path / "a.ckpt", gpt(), config=config)
        with pytest.raises(
            CheckpointError, match=r"activation \('relu' there, 'gelu_tanh' here\); expected the same"
        ):
            load_warm_start(gpt(), path)
        with pytest.raises(CheckpointError, match="n_head"):
            load_warm_start(gpt(n_head=4, activation="relu"), path)

    def test_options_that_are_null_are_resolved(self, tmp_path: Path) -> None:
        options = {"d_model": 16, "n_head": 2, "d_head": None, "n_head_kv": None}
        options |= {"position": "rotary", "rotary_fraction": 0.5}
        config = {f"model.{name}": value for name, value in options.items()}
        source = gpt(position="rotary", rotary_dim=4)
        path = write_checkpoint(tmp_path / "a.ckpt", source, config=config)
        model = gpt(position="rotary", rotary_dim=4, n_head_kv=2)
        load_warm_start(model, path)
        assert equal(model, source)
        with pytest.raises(CheckpointError, match=r"num_rotary_dims \(4 there, 8 here\)"):
            load_warm_start(gpt(position="rotary"), path)

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        torch.save({"weights": torch.ones(1)}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match="a file without weights"):
            load_warm_start(gpt(), str(tmp_path / "a.ckpt"))


class TestNames:
    def test_missing_and_unexpected_are_named_with_the_closest(self, tmp_path: Path) -> None:
        source = {f"model.{name}": tensor for name, tensor in gpt().state_dict().items()}
        source["model.transformer.ln_ff.weight"] = source.pop("model.transformer.ln_f.weight")
        torch.save({"state_dict": source}, tmp_path / "a.ckpt")
        model = gpt()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError) as error:
            load_warm_start(model, str(tmp_path / "a.ckpt"))
        assert "no transformer.ln_f.weight (did you mean 'transformer.ln_ff.weight'?)" in str(error.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_a_new_head_must_be_named(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "a.ckpt", vit(n_classes=5))
        model = vit()
        before = model.head.weight.clone()
        with pytest.raises(CheckpointError, match=r"head.weight \(5, 16\) instead of \(3, 16\)"):
            load_warm_start(model, path)
        assert load_warm_start(model, path, skip=["head.*"]) == ["head.bias", "head.weight"]
        assert torch.equal(model.head.weight, before)

    def test_the_error_names_what_to_skip(self, tmp_path: Path) -> None:
        pretrained = BertForPreTraining(BertConfig(**SIZES))
        path = write_checkpoint(tmp_path / "a.ckpt", pretrained)
        model = BertForSequenceClassification(BertConfig(**SIZES), 3)
        for check in (load_warm_start, check_warm_start):
            with pytest.raises(CheckpointError) as error:
                check(model, path)
            assert "'model.warm_start_skip=[classifier.*,head.*]'" in str(error.value)
        kept = ["classifier.bias", "classifier.weight"]
        assert load_warm_start(model, path, skip=["classifier.*", "head.*"]) == kept
        path = write_checkpoint(tmp_path / "b.ckpt", BertForMaskedLM(BertConfig(**SIZES)))
        with pytest.raises(CheckpointError, match=r"\[classifier\.\*,bert\.pooler\.\*,head\.\*\]"):
            load_warm_start(model, path, skip=["classifier.*"])

    def test_checking_needs_no_memory_for_weights(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model, other = vit(image_size=16), vit(image_size=16, n_classes=5)
        config = {"model.image_size": 8, "model.patch_size": 4}
        save_pretrained(vit(), tmp_path / "hf")
        for where in (write_checkpoint(tmp_path / "a.ckpt", vit(), config=config), str(tmp_path / "hf")):
            check_warm_start(model, where)
            with pytest.raises(CheckpointError, match=r"'model.warm_start_skip=\[head\.\*\]'"):
                check_warm_start(other, where)

    def test_a_pattern_that_matches_nothing_is_refused(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "a.ckpt", vit())
        with pytest.raises(CheckpointError, match=r"warm_start_skip: got 'heads.\*'"):
            load_warm_start(vit(), path, skip=["heads.*"])


class TestVocabulary:
    @pytest.mark.parametrize(("theirs", "ours"), [(37, 40), (40, 37)])
    def test_padding_may_differ(self, tmp_path: Path, theirs: int, ours: int) -> None:
        source = gpt(vocab_size=theirs)
        save_pretrained(source, tmp_path / "hf")
        model = gpt(vocab_size=ours)
        before = model.transformer.embeddings.word_embeddings.weight.clone()
        name = "transformer.embeddings.word_embeddings.weight"
        assert load_warm_start(model, str(tmp_path / "hf")) == ([name] if ours > theirs else [])
        rows = min(theirs, ours)
        embedding = model.state_dict()[name]
        assert torch.equal(embedding[:rows], source.state_dict()[name][:rows])
        assert torch.equal(embedding[rows:], before[rows:])
        with pytest.raises(CheckpointError, match=r"word_embeddings\.weight"):
            load_warm_start(model, str(tmp_path / "hf"), vocab_padding=2)


class TestHuggingFaceFolders:
    def test_decoder(self, tmp_path: Path) -> None:
        source = gpt(position="rotary", norm="rms_norm", activation="swiglu", qkv_bias=False, out_bias=False,
                     mlp_bias=False, tie_embeddings=False, norm_eps=1e-6)  # fmt: skip
        save_pretrained(source, tmp_path / "hf")
        model = GPTLMHeadModel(source.config)
        load_warm_start(model, str(tmp_path / "hf"))
        assert equal(model, source)
        with pytest.raises(CheckpointError, match=r"norm_eps \(1e-06 there, 1e-05 here\)"):
            other = {**source.config.to_dict(), "norm_eps": 1e-5}
            load_warm_start(GPTLMHeadModel(GPTConfig.from_dict(other)), str(tmp_path / "hf"))

    def test_masked_lm_of_a_whole_bert(self, tmp_path: Path) -> None:
        source = BertForPreTraining(BertConfig(**SIZES))
        save_pretrained(source, tmp_path / "hf")
        model = BertForMaskedLM(BertConfig(**SIZES))
        assert load_warm_start(model, str(tmp_path / "hf")) == []
        wanted = source.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())

    def test_encoders_without_head(self, tmp_path: Path) -> None:
        bert = BertModel(BertConfig(**SIZES), with_pooler=False)
        save_pretrained(bert, tmp_path / "bert")
        model = BertForMaskedLM(BertConfig(**SIZES))
        with pytest.raises(CheckpointError, match=r"no head\.bias"):
            load_warm_start(model, str(tmp_path / "bert"))
        load_warm_start(model, str(tmp_path / "bert"), skip=["head.*"])
        assert equal(model, bert, prefix="bert.")
        encoder = ViTModel(ViTConfig(**{**IMAGES, "n_classes": 0}))
        save_pretrained(encoder, tmp_path / "vit")
        classifier = vit()
        load_warm_start(classifier, str(tmp_path / "vit"), skip=["head.*"])
        assert equal(classifier, encoder, prefix="vit.")

    def test_models_of_transformers(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        shape = transformers.GPT2Config(vocab_size=40, n_positions=8, n_layer=1, n_head=2, n_embd=16)
        source = transformers.GPT2LMHeadModel(shape)
        source.save_pretrained(tmp_path / "hf")
        model = transformers.GPT2LMHeadModel(shape)
        load_warm_start(model, str(tmp_path / "hf"))
        assert equal(model, source)
        # What the files lack transformers makes up; here it is an error, or stays as it was.
        name, file = "transformer.h.0.attn.c_attn.weight", tmp_path / "hf" / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"got no {name}; expected"):
            load_warm_start(model, str(tmp_path / "hf"))
        assert load_warm_start(model, str(tmp_path / "hf"), skip=[name]) == [name]
        with pytest.raises(CheckpointError, match=rf"its files have no {name} \(1 tensors"):
            restore(str(tmp_path / "hf"), ["model=hugging_face"])
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"warm_start=.*cannot be read"):
            load_warm_start(model, str(tmp_path / "hf"))
        with pytest.raises(CheckpointError, match="cannot be read"):
            restore(str(tmp_path / "hf"), ["model=hugging_face"])

    def test_an_unknown_place_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        (tmp_path / "empty").mkdir()
        for source in (str(tmp_path / "empty"), str(tmp_path / "nowhere")):
            with pytest.raises(CheckpointError, match=r"warm_start=.*cannot be read.*Expected a run folder"):
                load_warm_start(gpt(), source)

    def test_hub_names_are_downloaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = gpt()
        save_pretrained(source, tmp_path / "hf")
        asked = []

        def fake(name: str, **options: Any) -> str:
            asked.append(name)
            return str(tmp_path / "hf")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        model = gpt()
        load_warm_start(model, "someone/some-gpt")
        assert asked == ["someone/some-gpt"] and equal(model, source)


class TestPositions:
    @pytest.mark.parametrize("image_size", [16, 4])
    def test_another_grid_is_interpolated(self, tmp_path: Path, image_size: int) -> None:
        source = vit()
        own = write_checkpoint(
            tmp_path / "a.ckpt", source, config={"model.image_size": 8, "model.patch_size": 4}
        )
        save_pretrained(source, tmp_path / "hf")
        name = "vit.embeddings.position_embeddings"
        expected = interpolate_positions(
            source.state_dict()[name], (2, 2), (image_size // 4,) * 2, n_prefix=1, antialias=True
        )
        for where in (own, str(tmp_path / "hf")):
            model = vit(image_size=image_size)
            assert load_warm_start(model, where) == []
            assert torch.equal(model.state_dict()[name], expected)
            assert torch.equal(model.head.weight, source.head.weight)
