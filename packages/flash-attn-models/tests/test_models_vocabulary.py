"""Models with rows added to their vocabulary, and cut off again."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flash_attn_models import GPTConfig, GPTLMHeadModel, generate, load_pretrained, save_pretrained
from flash_attn_models.gpt import with_vocab_size

KINDS = {
    "tied": {},
    "untied with a bias": {"tie_embeddings": False, "head_bias": True},
    "narrow": {"d_embedding": 20},
}


def make(**options):
    config = GPTConfig(
        vocab_size=131, max_seqlen=64, n_layer=2, n_head=4, d_model=48, eos_token_id=130, **options
    )
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.bias":
                parameter.normal_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_more_rows_and_back(kind, tmp_path):
    model = make(**KINDS[kind])
    padded = with_vocab_size(model, 192)
    assert (padded.config.vocab_size, model.config.vocab_size) == (192, 131)
    input_ids = torch.randint(131, (4, 33))
    expected, logits = model(input_ids), padded(input_ids)
    torch.testing.assert_close(logits[..., :131], expected, atol=1e-5, rtol=1e-5)
    mean = expected.mean(-1, keepdim=True).expand(-1, -1, 61)
    torch.testing.assert_close(logits[..., 131:], mean, atol=1e-4, rtol=1e-4)
    assert (logits.argmax(-1) < 131).all()
    assert torch.equal(generate(padded, input_ids[:, :9], 20), generate(model, input_ids[:, :9], 20))
    back = with_vocab_size(padded, 131)
    assert back.config == model.config
    if kind == "tied":  # the others are of no Hugging Face family
        save_pretrained(back, tmp_path / "m")
        back = load_pretrained(tmp_path / "m")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_it_is_a_copy():
    model = make().train()
    model.transformer.embeddings.word_embeddings.weight.requires_grad_(False)
    model.transformer.activation_checkpointing = "mlp"
    other = with_vocab_size(model, 131)
    assert other.training
    assert other.transformer.activation_checkpointing == "mlp"
    assert other.transformer.layers[1].mlp.checkpoint_lvl == 1
    assert not other.head_weight.requires_grad
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert with_vocab_size(make().bfloat16(), 192).head_weight.dtype == torch.bfloat16


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"GPTConfig.eos_token_id: got 130"):
        with_vocab_size(make(), 100)
    with pytest.raises(ValueError, match="model: got a Linear"):
        with_vocab_size(torch.nn.Linear(2, 2), 100)
    with pytest.raises(ValueError, match="vocab_size: got 192; expected at most 131"):
        with_vocab_size(make(normalize_head=True), 192)
