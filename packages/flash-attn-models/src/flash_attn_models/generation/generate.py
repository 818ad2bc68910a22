"""Autoregressive generation with a key/value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.generation.sampling import filter_logits, sample
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers import KVCache


def generate(
    model: GPTLMHeadModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each prompt by up to ``max_new_tokens`` tokens.

    Args:
        model: language model. Runs in evaluation mode, whatever mode it is in, and is left as it was.
        input_ids: prompts (B,S) of equal length, on the model's device.
        max_new_tokens: most tokens to add; S + max_new_tokens may not exceed the context.
        do_sample: draw each token; otherwise take the most likely one (greedy).
        temperature, top_k, top_p: how to draw, see ``flash_attn_models.generation.sampling``. Only with
            do_sample.
        eos_token_id: id or ids that end a sequence; None takes the config's; an empty sequence never ends.
        pad_token_id: fills a row after its end; None takes the config's, or else the first end id.
        generator: seeds drawing, on the model's device. Only with do_sample.

    Returns:
        Token ids (B,S+n), int64: prompts and continuations. n is ``max_new_tokens``, or less if every row
        ended before.

    Raises:
        ValueError: prompt and new tokens longer than the context, ids outside the vocabulary, or options that
            do not make sense or would have no effect; naming the argument and the fix.
    """
    tokens = stream_tokens(
        model,
        input_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        do_sample=do_sample,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        generator=generator,
    )
    return torch.cat([input_ids.long(), *(token[:, None] for token in tokens)], dim=1)


def stream_tokens(
    model: GPTLMHeadModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens of ``generate``, same arguments, one column (B,) at a time as soon as it is known."""
    _check_prompt(model, input_ids, max_new_tokens)
    if do_sample:  # a bad option is refused now, and not when the first token is asked for
        filter_logits(torch.zeros(1), temperature=temperature, top_k=top_k, top_p=top_p)
    else:
        _refuse_sampling_options(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    if generator is not None and generator.device.type != input_ids.device.type:
        raise bad_argument(
            "generator",
            f"a generator on {generator.device}",
            f"one on the model's device, {input_ids.device}",
            f"make it with torch.Generator({input_ids.device.type!r})",
        )
    eos_ids = _eos_ids(model.config, eos_token_id)
    pad_id = _pad_id(model.config, pad_token_id, eos_ids)

    def choose(logits: Tensor) -> Tensor:
        if do_sample:
            return sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return logits.argmax(dim=-1)

    return _decode(model, input_ids, max_new_tokens, choose, eos_ids, pad_id)


@torch.no_grad()
def _decode(
    model: GPTLMHeadModel,
    input_ids: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Iterator[Tensor]:
    """Yield tokens (B,). From the step after its first end id on, a row gets ``pad_id`` and nothing else."""
    batch_size, seqlen = input_ids.shape
    # The last new token is never fed back, so it needs no place.
    cache = make_cache(model, batch_size, seqlen + max_new_tokens - 1)
    ends = torch.tensor(eos_ids, dtype=torch.int64, device=input_ids.device)
    finished = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids
    for _ in range(max_new_tokens):
        with _evaluating(model):
            logits = model(tokens, cache=cache, num_last_tokens=1)[:, 0]
        chosen = choose(logits).masked_fill(finished, pad_id)
        yield chosen
        if eos_ids:
            finished |= torch.isin(chosen, ends)
            if finished.all():
                return
        tokens = chosen[:, None]


def make_cache(model: GPTLMHeadModel, batch_size: int, max_seqlen: int) -> KVCache:
    """An empty cache of the model's shape, on its device, in the dtype that its attention computes in."""
    config, weight = model.config, model.head_weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return KVCache(
        config.n_layer,
        batch_size,
        max_seqlen,
        config.num_heads_kv,
        config.head_dim,
        device=weight.device,
        dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_prompt(model: GPTLMHeadModel, input_ids: Tensor, max_new_tokens: int) -> None:
    config = model.config
    if max_new_tokens < 1:
        raise bad_argument("max_new_tokens", max_new_tokens, "at least 1", "ask for at least one token")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.int32, torch.int64):
        raise bad_argument(
            "input_ids",
            f"shape {tuple(input_ids.shape)}, {input_ids.dtype}",
            "token ids of shape (batch, seqlen) with at least one token each, int64 or int32",
            "add a batch dimension with input_ids[None], or start with the beginning-of-text token",
        )
    seqlen = input_ids.shape[1]
    if seqlen + max_new_tokens > config.max_seqlen:
        raise bad_argument(
            "input_ids",
            f"a prompt of {seqlen} tokens and max_new_tokens={max_new_tokens}",
            f"together at most the context of max_seqlen={config.max_seqlen}",
            f"keep only the prompt's end, input_ids[:, -{config.max_seqlen - max_new_tokens}:]"
            if max_new_tokens < config.max_seqlen
            else f"set max_new_tokens below {config.max_seqlen}",
        )
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < config.vocab_size:
        raise bad_argument(
            "input_ids",
            f"ids from {int(input_ids.min())} to {int(input_ids.max())}",
            f"ids in [0, vocab_size={config.vocab_size})",
            "use the tokenizer that belongs to this model",
        )


def _refuse_sampling_options(
    *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> None:
    given = {
        "top_k": top_k,
        "top_p": top_p,
        "generator": generator,
        "temperature": None if temperature == 1 else temperature,
    }
    for name, value in given.items():
        if value is not None:
            raise bad_argument(
                name,
                value,
                "to be left out with do_sample=False, where it has no effect",
                "pass do_sample=True",
            )


def _eos_ids(config: GPTConfig, eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos_token_id is None:
        return config.eos_token_ids
    ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    for token in ids:
        _check_token_id("eos_token_id", token, config)
    return ids


def _pad_id(config: GPTConfig, pad_token_id: int | None, eos_ids: tuple[int, ...]) -> int:
    if pad_token_id is not None:
        _check_token_id("pad_token_id", pad_token_id, config)
        return pad_token_id
    if config.pad_token_id is not None:
        return config.pad_token_id
    return eos_ids[0] if eos_ids else 0  # without an end id no row ends, and nothing is filled


def _check_token_id(name: str, token: int, config: GPTConfig) -> None:
    if not 0 <= token < config.vocab_size:
        raise bad_argument(
            name,
            token,
            f"a token id in [0, vocab_size={config.vocab_size})",
            "use the id that this model's tokenizer has",
        )
