"""The GPT model against a plain PyTorch one, and what its options and switches do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from flash_attn_models.generation import make_cache
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.loss import cross_entropy
from torch.nn import functional as F

SMALL = GPTConfig(vocab_size=61, max_seqlen=24, n_layer=2, n_head=4, d_model=32, initializer_range=0.2)
ROTARY = dataclasses.replace(SMALL, position="rotary")


def tokens(config, batch=2, seqlen=13):
    return torch.randint(config.vocab_size, (batch, seqlen))


def gradients(model, logits):
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


def test_logits_and_gradients_equal_plain_pytorch_in_float64(config, plain_gpt):
    config = dataclasses.replace(config, initializer_range=0.2)
    model = GPTLMHeadModel(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    input_ids = tokens(config, seqlen=config.max_seqlen - 1)
    out = model(input_ids)
    ref = plain_gpt(config, dict(model.named_parameters()), input_ids)
    assert out.shape == (2, config.max_seqlen - 1, config.vocab_size)
    # The norms compute their statistics in fp32 at least; everything else here is fp64.
    torch.testing.assert_close(out, ref, rtol=1e-9, atol=1e-9)
    expected = gradients(model, ref)
    for name, grad in gradients(model, out).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-8, msg=name)


def test_bfloat16_logits_obey_the_tolerance_law(config, plain_gpt):
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.2), dtype=torch.bfloat16)
    weights = model.state_dict()
    input_ids = tokens(config, seqlen=33)
    out = model(input_ids).double()
    pt = plain_gpt(config, weights, input_ids).double()
    ref = plain_gpt(config, {name: tensor.double() for name, tensor in weights.items()}, input_ids)
    assert model(input_ids).dtype == torch.bfloat16
    last_place = torch.finfo(torch.bfloat16).eps * ref.abs().max()
    assert (out - ref).abs().max() <= 2 * (pt - ref).abs().max() + last_place


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": 2},
        {"n_head_kv": 2},
        {"d_head": 12},
        {"d_inner": 40},
        {"n_layer": 1},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"activation": "swiglu", "d_inner": 128},
        {"norm": "rms_norm"},
        {"norm_eps": 0.5},
        {"position": "rotary"},
        {"qkv_bias": False},
        {"out_bias": False},
        {"mlp_bias": False},
        {"tie_embeddings": False},
        {"tie_embeddings": False, "head_bias": True},
        {"position": "alibi"},
        {"position_offset": 2},
        {"window": 5},
        {"window": 5, "window_first_layer": 1},
        {"softcap": 0.5},
        {"softmax_scale": 1.0},
        {"softmax_scale_by_layer": True},
        {"qk_norm": True},
        {"prenorm": False},
        {"parallel_block": True},
        {"parallel_block": True, "tied_norm": True},
        {"d_embedding": 20},
        {"normalize_head": True},
        {"embedding_scale": 3.0},
        {"logit_scale": 0.5},
    ],
    ids=str,
)
def test_every_architecture_field_changes_the_logits(changes):
    _assert_logits_differ(SMALL, dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_base": 100.0},
        {"rotary_dim": 4},
        {"rotary_interleaved": True},
        {"rotary_scaling": {"kind": "linear", "factor": 2.0}},
        {"rotary_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_seqlen": 8}},
        {"rotary_scaling": {"kind": "yarn", "factor": 2.0, "original_max_seqlen": 12}},
        {
            "rotary_scaling": {
                "kind": "llama3",
                "factor": 2.0,
                "original_max_seqlen": 12,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ],
    ids=str,
)
def test_every_rotary_field_changes_the_logits(changes):
    _assert_logits_differ(ROTARY, dataclasses.replace(ROTARY, **changes))


def test_alibi_scaled_and_the_first_layer_of_a_window_change_the_logits():
    alibi = dataclasses.replace(SMALL, position="alibi")
    _assert_logits_differ(alibi, dataclasses.replace(alibi, alibi_scaled=True))
    window = dataclasses.replace(SMALL, window=5)
    _assert_logits_differ(window, dataclasses.replace(window, window_first_layer=1))
    _assert_logits_differ(window, dataclasses.replace(window, window_layers=(True, False)))


def _assert_logits_differ(config, changed):
    """Same weights wherever both have them; biases set to something, so that leaving them out shows."""
    model, other = GPTLMHeadModel(config).eval(), GPTLMHeadModel(changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter))
    shared = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in other.state_dict() and other.state_dict()[name].shape == tensor.shape
    }
    other.load_state_dict(shared, strict=False)
    input_ids = tokens(config)
    assert not torch.allclose(model(input_ids), other(input_ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", ["dropout", "embedding_dropout", "attn_dropout"])
def test_dropout_acts_in_training_only(field):
    model = GPTLMHeadModel(dataclasses.replace(SMALL, **{field: 0.5}))
    input_ids = tokens(SMALL)
    assert not torch.equal(model(input_ids), model(input_ids))
    torch.manual_seed(3)
    first = model(input_ids)
    torch.manual_seed(3)
    assert torch.equal(first, model(input_ids))
    model.eval()
    assert torch.equal(model(input_ids), model(input_ids))


def test_embedding_dropout_defaults_to_dropout_and_can_differ():
    both = GPTLMHeadModel(dataclasses.replace(SMALL, dropout=0.3)).transformer
    assert (both.embeddings.dropout.p, both.layers[0].norm2.dropout_p) == (0.3, 0.3)
    only_residual = GPTLMHeadModel(dataclasses.replace(SMALL, dropout=0.3, embedding_dropout=0.0)).transformer
    assert (only_residual.embeddings.dropout.p, only_residual.ln_f.dropout_p) == (0.0, 0.3)


def test_initial_weights():
    config = GPTConfig(
        vocab_size=500, max_seqlen=200, n_layer=8, n_head=4, d_model=128, initializer_range=0.05
    )
    model = GPTLMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name or "ln_f" in name:
            assert (parameter == 1).all(), name
        else:
            writes_to_residual = name.endswith(("out_proj.weight", "fc2.weight"))
            std = 0.05 / math.sqrt(2 * 8) if writes_to_residual else 0.05
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


def test_initial_loss_is_that_of_a_uniform_guess():
    config = dataclasses.replace(SMALL, initializer_range=0.02)
    input_ids = tokens(config, batch=8, seqlen=24)
    logits = GPTLMHeadModel(config)(input_ids)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.1)


def test_tied_head_is_the_embedding():
    tied = GPTLMHeadModel(SMALL)
    untied = GPTLMHeadModel(dataclasses.replace(SMALL, tie_embeddings=False))
    assert tied.head_weight is tied.transformer.embeddings.word_embeddings.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.num_parameters() - tied.num_parameters() == SMALL.vocab_size * SMALL.d_model
    embeddings = (SMALL.vocab_size + SMALL.max_seqlen) * SMALL.d_model
    assert tied.num_parameters() - tied.num_parameters(embeddings=False) == embeddings


def test_a_tied_head_may_have_a_bias():
    config = dataclasses.replace(SMALL, head_bias=True)
    model, plain = GPTLMHeadModel(config), GPTLMHeadModel(SMALL)
    assert model.head_weight is model.transformer.embeddings.word_embeddings.weight
    assert model.state_dict().keys() - plain.state_dict().keys() == {"lm_head.bias"}
    assert not model.lm_head.bias.any()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    input_ids = tokens(config)
    torch.testing.assert_close(model(input_ids), plain(input_ids) + model.lm_head.bias)
    model.reset_parameters()
    assert not model.lm_head.bias.any()


def test_num_last_tokens_gives_the_last_logits():
    model = GPTLMHeadModel(SMALL)
    input_ids = tokens(SMALL)
    logits = model(input_ids)
    for n in (1, 3, 13):
        torch.testing.assert_close(model(input_ids, num_last_tokens=n), logits[:, -n:])
    for n in (0, -1, 14):
        with pytest.raises(
            ValueError, match=rf"num_last_tokens: got {n}; expected between 1 and the 13 positions"
        ):
            model(input_ids, num_last_tokens=n)


def test_no_logit_depends_on_a_later_token(config):
    model = GPTLMHeadModel(config).eval()
    input_ids = tokens(config)
    changed = input_ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % config.vocab_size
    before, after = model(input_ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_activation_checkpointing_recomputes_and_keeps_gradients(config):
    model = GPTLMHeadModel(config)
    calls = []
    model.transformer.layers[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    input_ids = tokens(config)
    expected = gradients(model, model(input_ids))
    assert len(calls) == 1
    model.transformer.activation_checkpointing = True
    grads = gradients(model, model(input_ids))
    assert len(calls) == 3  # forward, and once more in backward
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]), name


def test_autocast_computes_attention_in_its_dtype(config, plain_gpt):
    # Weights large enough for attention to matter.
    model = GPTLMHeadModel(dataclasses.replace(config, initializer_range=0.2))
    input_ids = tokens(config)
    seen = []
    model.transformer.layers[0].mixer.out_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids)
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad():
        expected = model(input_ids)
        weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        plain_error = (plain_gpt(config, weights, input_ids) - expected).square().mean()
        assert (logits - expected).square().mean() <= 2 * plain_error


def test_compiled_model_equals_eager():
    config = dataclasses.replace(ROTARY, n_layer=1, activation="swiglu", norm="rms_norm")
    model = GPTLMHeadModel(config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seqlen in (13, 17):
        input_ids = tokens(config, seqlen=seqlen)
        torch.testing.assert_close(compiled(input_ids), model(input_ids))
    expected = gradients(model, model(input_ids))
    for name, grad in gradients(model, compiled(input_ids)).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_meta_device_allocates_nothing(config):
    model = GPTLMHeadModel(config, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, config.vocab_size)


def test_dtype_argument():
    model = GPTLMHeadModel(SMALL, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_one_training_step_lowers_the_loss(config):
    model = GPTLMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    input_ids = tokens(config)

    def loss():
        return F.cross_entropy(model(input_ids)[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (
            torch.zeros(5, dtype=torch.int64),
            r"input_ids: got shape \(5,\).*expected token ids of shape \(batch, seqlen\)",
        ),
        (torch.zeros(1, 5), r"input_ids: got shape \(1, 5\), torch.float32; expected token ids"),
        (
            torch.zeros(1, 25, dtype=torch.int64),
            r"input_ids: got 25 tokens; expected at most .*max_seqlen=24",
        ),
        (torch.zeros(1, 5, dtype=torch.int64, device="meta"), r"input_ids: got device meta; expected .*cpu"),
    ],
)
def test_bad_inputs_are_refused(input_ids, message):
    for config in (SMALL, ROTARY):
        with pytest.raises(ValueError, match=message + r".*Fix: "):
            GPTLMHeadModel(config)(input_ids)


def test_cache_may_not_outgrow_the_context():
    model = GPTLMHeadModel(SMALL)
    cache = make_cache(model, 1, 100)
    with torch.no_grad():
        model(tokens(SMALL, batch=1, seqlen=20), cache=cache)
        with pytest.raises(
            ValueError, match=r"input_ids: got 5 tokens after 20 in the cache; expected .*max_seqlen=24"
        ):
            model(tokens(SMALL, batch=1, seqlen=5), cache=cache)
    assert cache.length == 20
