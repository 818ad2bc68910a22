"""Our attention inside transformers models: the logits and tokens of their eager attention, and errors otherwise."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from flash_attn_models.transformers_integration import ATTENTION_NAME, attention, register_with_transformers
from flash_attn_models.transformers_integration.attention import attention_forward

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**_GQA),
    "gpt2": lambda: transformers.GPT2Config(
        **_GPT2, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0
    ),
    "mistral": lambda: transformers.MistralConfig(**_GQA, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GQA, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GQA, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    return register_with_transformers()


def pair(config, auto="AutoModelForCausalLM"):
    """The same model with eager attention and with ours."""
    torch.manual_seed(0)
    make = getattr(transformers, auto).from_config
    # Each keeps the config that it is given, and the implementation in it.
    eager, ours = (
        make(copy.deepcopy(config), attn_implementation=name).eval() for name in ("eager", ATTENTION_NAME)
    )
    assert eager.config._attn_implementation == "eager"
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if name.endswith(("sinks", "router.weight")):
                parameter.normal_()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


@pytest.fixture(params=DECODERS.values(), ids=DECODERS.keys(), scope="module")
def models(request):
    return pair(request.param())


def batch(side, lengths=(9, 4, 7)):
    """Padded prompts and their mask."""
    ids, mask = torch.randint(1, 101, (len(lengths), max(lengths))), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    return ids * mask.long(), mask.long()


@torch.no_grad()
def test_logits_without_padding(models):
    eager, ours = models
    ids = torch.randint(1, 101, (2, 17))
    torch.testing.assert_close(ours(ids).logits, eager(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_batches(models, side):
    eager, ours = models
    ids, mask = batch(side)
    real = mask.bool()
    expected, got = (model(ids, attention_mask=mask).logits[real] for model in (eager, ours))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    if side == "left":  # behind them, causal attention does not see it
        assert (ours(ids).logits[real] - got).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", None])
def test_generation_token_for_token(models, side, cache):
    eager, ours = models
    if side is None:
        ids = torch.randint(1, 101, (2, 6))
        mask = torch.ones_like(ids)
    else:
        ids, mask = batch(side)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = eager.generate(ids, **options)
    got = ours.generate(ids, **options, cache_implementation=None if cache == "dynamic" else "static")
    assert torch.equal(got, expected)


@torch.no_grad()
def test_several_tokens_after_a_cache(models):
    eager, ours = models
    ids, mask = batch("left")
    outputs = []
    for model in (eager, ours):
        first = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        outputs.append(model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("given", [None, "mask"])
def test_static_cache_in_a_plain_forward(models, given):
    """Without a mask too, the room behind the tokens is not attended to."""
    eager, ours = models
    ids = torch.randint(1, 101, (2, 7))
    outputs = []
    for model in (eager, ours):
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        parts = []
        for start, stop in ((0, 4), (4, 6), (6, 7)):
            mask = None if given is None else torch.ones(2, stop, dtype=torch.long)
            parts.append(
                model(ids[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True).logits
            )
        outputs.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1], ours(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_sequences(models):
    """By position_ids alone, and by bounds: the logits of each sequence alone."""
    _, ours = models
    lengths = (5, 1, 8)
    parts = [torch.randint(1, 101, (1, length)) for length in lengths]
    ids = torch.cat(parts, dim=1)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = torch.cat([ours(part).logits for part in parts], dim=1)
    by_position = ours(ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(by_position, expected, atol=1e-4, rtol=1e-4)
    bounds = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    by_bounds = ours(ids, position_ids=position_ids, use_cache=False, **packing).logits
    torch.testing.assert_close(by_bounds, expected, atol=1e-4, rtol=1e-4)
    assert (ours(ids).logits - expected).abs().max() > 1e-3


def test_gradients():
    eager, ours = pair(DECODERS["mistral"]())
    ids, mask = batch("right")
    labels = ids.masked_fill(mask == 0, -100)
    for model in (eager, ours):
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-3)


def test_dropout_acts_in_training():
    config = transformers.LlamaConfig(**_GQA, attention_dropout=0.5)
    _, ours = pair(config)
    ids = torch.randint(1, 101, (2, 17))
    ours.train()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)
    ours.eval()
    assert torch.equal(ours(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_bert_padded():
    config = transformers.BertConfig(**_SIZES)
    eager, ours = pair(config, "AutoModel")
    for side in ("left", "right"):
        ids, mask = batch(side)
        expected, got = (
            model(ids, attention_mask=mask).last_hidden_state[mask.bool()] for model in (eager, ours)
        )
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_windows_to_both_sides():
    sizes = {name: value for name, value in _SIZES.items() if "token_id" not in name}
    ids_of = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    config = transformers.ModernBertConfig(
        **sizes, **ids_of, local_attention=6, global_attn_every_n_layers=2, reference_compile=False
    )
    eager, ours = pair(config, "AutoModel")
    for side in ("left", "right"):
        ids, mask = batch(side, (19, 11))
        expected, got = (
            model(ids, attention_mask=mask).last_hidden_state[mask.bool()] for model in (eager, ours)
        )
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cross_attention_keeps_all_queries():
    """The mask is of the encoder's tokens, even if there are as many of the decoder's."""
    sizes = {name: value for name, value in _SIZES.items() if name != "intermediate_size"}
    config = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    eager, ours = pair(config, "AutoModel")
    ids, mask = batch("left")
    others = torch.randint(1, 101, ids.shape)
    encoded = torch.randn(*ids.shape, 32)
    expected, got = (
        model(others, encoder_hidden_states=encoded, encoder_attention_mask=mask).last_hidden_state
        for model in (eager, ours)
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_masks_of_any_form_are_taken_whole():
    eager, ours = pair(DECODERS["llama"]())
    ids = torch.randint(1, 101, (2, 8))
    visible = (torch.rand(2, 1, 8, 8) < 0.5) | torch.eye(8, dtype=torch.bool)
    added = torch.zeros(2, 1, 8, 8).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = eager(ids, attention_mask=added).logits
    for mask in (visible, added):
        torch.testing.assert_close(ours(ids, attention_mask=mask).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_between_tokens_with_a_window():
    eager, ours = pair(DECODERS["mistral"]())
    ids, mask = torch.randint(1, 101, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 4:7] = 0
    expected, got = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (eager, ours))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_has_no_meaning_here_is_refused():
    x = torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    for name in (
        *("output_attentions", "position_bias", "block_table"),
        *("indices", "block_indices", "sinks"),  # of sparse attention, and of sinks for each token
    ):
        with pytest.raises(ValueError, match=rf"{name}: got a value; expected None"):
            attention_forward(module, x, x, x, None, **{name: True})
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 5\), torch.int64"):
        attention_forward(module, x, x, x, torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 1, 5, 5\), torch.int64"):
        attention_forward(module, x, x, x, torch.ones(1, 1, 5, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 6\)"):
        attention_forward(module, x, x, x, torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q and cu_seq_lens_k: got one of them"):
        attention_forward(module, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 5]))
    bounds = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="both beside an attention_mask"):
        attention_forward(
            module,
            x,
            x,
            x,
            torch.ones(1, 5, dtype=torch.bool),
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
        )


def test_deterministic_gradients_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        attention, "flash_attn_func", lambda q, *_, **options: asked.append(options["deterministic"]) or q
    )
    x = torch.randn(1, 2, 5, 8)
    for given in (None, True):
        attention_forward(torch.nn.Module(), x, x, x, None, deterministic=given)
    assert asked == [False, True]


@pytest.mark.parametrize("name", ["flash_kernels", "org/kernels", "paged|x", "eager", ""])
def test_names_that_transformers_reads_otherwise_are_refused(name):
    with pytest.raises(ValueError, match="name: got"):
        register_with_transformers(name)


def test_transformers_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'flash-attn-models\[transformers\]'"):
        register_with_transformers()


def test_narrow_weights_decide_where_norms_are_wide():
    """As with norms kept in float32: attention runs in the dtype of the projections."""
    module = torch.nn.Module()
    module.q_proj = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    x = torch.randn(1, 2, 5, 8)
    assert attention_forward(module, x, x, x, None)[0].dtype == torch.bfloat16
    assert attention_forward(torch.nn.Module(), x, x, x, None)[0].dtype == torch.float32
    assert attention_forward(torch.nn.Module(), x, x, x.half(), None)[0].dtype == torch.float16


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_compiled_with_a_static_cache(kind):
    """No value is read while compiling: masks come complete, and shapes do not change from token to token."""
    eager, ours = pair(DECODERS[kind]())
    ids, mask = batch("left")
    compiled = torch.compile(ours, backend="eager")
    outputs = []
    for model, call in ((eager, eager), (ours, compiled)):
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        parts = []
        for start, stop in ((0, 5), (5, 6), (6, 7)):
            part = call(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
            )
            parts.append(part.logits)
        outputs.append(torch.cat(parts, dim=1)[mask[:, :7].bool()])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
