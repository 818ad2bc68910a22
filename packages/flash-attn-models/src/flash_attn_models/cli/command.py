"""``flash-attn-generate``: load a model, continue prompts, print text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from flash_attn_models.cli.arguments import (
    parse_arguments,
    read_device,
    read_dtype,
    read_prompts_of,
    read_sampling,
    read_stream,
)
from flash_attn_models.cli.text import GrowingText, HuggingFaceCodec, IdCodec, TextCodec
from flash_attn_models.errors import bad_argument
from flash_attn_models.generation import stream_tokens
from flash_attn_models.generation.ends import read_stop_strings
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.pretrained import from_pretrained

_DEFAULT_NEW_TOKENS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's). Returns the exit code: 0, or 2 after one line that says what
    is wrong with the input, or 130 when interrupted."""
    try:
        arguments = parse_arguments(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"flash-attn-generate: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    prompts = read_prompts_of(arguments)
    streams = read_stream(arguments, len(prompts))
    sampling = read_sampling(arguments)
    device, dtype = read_device(arguments.device), read_dtype(arguments.dtype)
    if arguments.ids and arguments.chat:
        raise bad_argument("--chat", "with --ids", "one of both", "leave one of them out")
    codec: TextCodec = IdCodec() if arguments.ids else HuggingFaceCodec(arguments.model, arguments.chat)
    ids = [codec.encode(prompt) for prompt in prompts]
    model = _load(arguments.model, device, dtype)
    draft: Any = arguments.draft
    if draft not in (None, "prompt_lookup"):
        draft = _load(draft, device, dtype)
    if arguments.max_new_tokens is None:
        contexts = [part.config.max_seqlen for part in (model, draft) if isinstance(part, GPTLMHeadModel)]
        arguments.max_new_tokens = max(1, min(_DEFAULT_NEW_TOKENS, min(contexts) - max(map(len, ids))))
    options = _options(arguments, model, codec, draft) | sampling
    if sampling and arguments.seed is not None:
        options["generator"] = torch.Generator(device).manual_seed(arguments.seed)
    n_tokens, start = 0, time.perf_counter()
    for first in range(0, len(ids), arguments.batch_size):
        batch = ids[first : first + arguments.batch_size]
        n_tokens += _continue(model, batch, codec, options, streams)
        if len(ids) > 1:
            print(f"{min(first + len(batch), len(ids))} of {len(ids)} prompts", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} a second", file=sys.stderr)
    return 0


def _load(name: str, device: torch.device, dtype: torch.dtype | None) -> GPTLMHeadModel:
    model = from_pretrained(name, device=device, dtype=dtype)
    if not isinstance(model, GPTLMHeadModel):
        raise bad_argument(
            "MODEL",
            f"{name}, a {type(model).__name__}",
            "a decoder that generates text",
            "choose another model",
        )
    return model


def _options(
    arguments: argparse.Namespace, model: GPTLMHeadModel, codec: TextCodec, draft: Any
) -> dict[str, Any]:
    """Arguments of ``stream_tokens`` but those of drawing."""
    # Of chat models, the config may know the end of a text, and the tokenizer that of a message.
    eos_ids = dict.fromkeys((*model.config.eos_token_ids, *codec.eos_ids))
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "repetition_penalty": arguments.repetition_penalty,
        "eos_token_id": tuple(token for token in eos_ids if token < model.config.vocab_size),
        "cuda_graph": arguments.cuda_graph,
        "draft": draft,
        "lookahead": arguments.lookahead,
    }
    if arguments.stop:
        options |= {"stop_strings": arguments.stop, "tokenizer": codec}
    return options


def _continue(
    model: GPTLMHeadModel, prompts: list[list[int]], codec: TextCodec, options: dict[str, Any], streams: bool
) -> int:
    """Print what follows each of a batch of prompts, token by token if it ``streams``; how many tokens those are."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
    columns = stream_tokens(
        model,
        input_ids.to(model.head_weight.device),
        prompt_lengths=[len(ids) for ids in prompts],
        **options,
    )
    eos_ids = options["eos_token_id"]
    rows: list[list[int]] = [[] for _ in prompts]
    growing = GrowingText(codec) if streams else None
    for column in columns:
        for row, token in zip(rows, column.tolist(), strict=True):
            row.append(token)
        if growing is not None and rows[0][-1] not in eos_ids:
            print(growing.add(rows[0][-1]), end="", flush=True)
    if growing is not None:
        print(growing.finish(), flush=True)
        return len(rows[0])
    n_tokens = 0
    for row in rows:
        text = _without_fill(row, eos_ids, options)
        n_tokens += len(text)
        print(codec.decode(text[:-1] if text[-1] in eos_ids else text), flush=True)
    return n_tokens


def _without_fill(row: list[int], eos_ids: Sequence[int], options: dict[str, Any]) -> list[int]:
    """A row up to the token that ended it: what follows fills it while others go on."""
    stop = read_stop_strings(options.get("stop_strings"), options.get("tokenizer"))
    recent: list[int] = []
    for place, token in enumerate(row):
        if token in eos_ids or (stop is not None and stop.ends(recent, token)):
            return row[: place + 1]
    return row
