"""A sample of what the model writes."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTLMHeadModel
from tokenizers import Tokenizer

from flash_attn_train.configs import GenerationConfig


def write_sample(
    model: GPTLMHeadModel,
    tokenizer: Tokenizer,
    end_of_text: int,
    config: GenerationConfig,
    *,
    prompt: str,
    seed: int,
) -> str:
    """Prompt and continuation, up to the end of the text, ``max_new_tokens`` or the context.

    An empty prompt starts a text of its own. Of a prompt longer than half of the context, the end is used.
    """
    ids = tokenizer.encode(prompt).ids or [end_of_text]  # a text of its own follows the end of another
    context = model.config.max_seqlen
    ids = ids[-max(1, context // 2) :]
    max_new_tokens = min(config.max_new_tokens, context - len(ids))
    device = next(model.parameters()).device
    options: dict[str, Any] = {}  # the most likely token, always
    if config.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "generator": torch.Generator(device).manual_seed(seed),
        }
    tokens = generate(
        model, torch.tensor([ids], device=device), max_new_tokens, eos_token_id=end_of_text, **options
    )
    return tokenizer.decode(tokens[0].tolist())
