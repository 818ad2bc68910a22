"""Arguments of ``flash-attn-generate``, and the prompts that they name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from flash_attn_models.errors import bad_argument

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, typed; SystemExit with code 2 and one line if it is wrong."""
    parser = _Parser(
        prog="flash-attn-generate",
        description="Continue prompts with a language model.",
        epilog="Without --prompt and --prompts-file one prompt is read from standard input. Text goes to standard "
        "output, everything else to standard error.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder or name of the model")
    add("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    add("--prompts-file", metavar="FILE", help="prompts, one a line")
    add("--ids", action="store_true", help="prompts and results are token ids, and no tokenizer is needed")
    add("--chat", action="store_true", help="each prompt is a user's message, in the model's chat template")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: %(default)s)")
    add("--max-new-tokens", type=int, metavar="N", help="default: 128, or what the context has room for")
    add("--temperature", type=float, metavar="T", help="draw tokens; 0: the most likely ones")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw among tokens that have probability P together")
    add(
        "--min-p", type=float, metavar="P", help="draw tokens at least P times as likely as the likeliest one"
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: tokens that occurred become less likely",
    )
    add("--seed", type=int, metavar="N", help="of drawing; otherwise each run draws others")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        help="a row ends with this text; may be given several times",
    )
    add("--device", default="auto", help="as torch names it (default: cuda if there is one)")
    add("--dtype", choices=_DTYPES, default="auto", help="default: that of the files")
    add("--draft", metavar="MODEL", help="speculative decoding with a smaller model, or 'prompt_lookup'")
    add("--lookahead", type=int, metavar="N", help="tokens drafted at a time")
    add("--cuda-graph", action=argparse.BooleanOptionalAction, help="default: where it can be")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print text as it comes, of one prompt at a time (default: if there is one)",
    )
    return parser.parse_args(argv)


def read_prompts_of(arguments: argparse.Namespace) -> list[str]:
    """The prompts in order; ValueError if there are none."""
    prompts = list(arguments.prompt or [])
    if arguments.prompts_file is not None:
        path = Path(arguments.prompts_file)
        if not path.is_file():
            raise bad_argument("--prompts-file", path, "a text file", "check the path")
        prompts += [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    elif arguments.prompt is None:
        prompts = [sys.stdin.read().rstrip("\n")]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise bad_argument(
            "prompt",
            "no text",
            "at least one prompt, none empty",
            "pass --prompt TEXT, or text on standard input",
        )
    if arguments.batch_size < 1:
        raise bad_argument("--batch-size", arguments.batch_size, "at least 1", "leave it out for the default")
    return prompts


def read_stream(arguments: argparse.Namespace, n_prompts: int) -> bool:
    """Whether text is printed as it comes; ValueError if that is asked for with several prompts at a time."""
    at_a_time = min(n_prompts, arguments.batch_size)
    if arguments.stream and at_a_time > 1:
        raise bad_argument(
            "--stream",
            f"{at_a_time} prompts at a time",
            "one, since only one text can grow on the screen",
            "add --batch-size 1, or leave --stream out",
        )
    return n_prompts == 1 if arguments.stream is None else bool(arguments.stream)


def read_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of ``generate`` that draw tokens; none if the most likely ones are taken. Any of them draws, unless
    the temperature is 0; ValueError for one without effect."""
    options = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    given = {name: value for name, value in options.items() if value is not None}
    if given and arguments.temperature != 0:
        return {"do_sample": True, **given}
    useless = [name for name in given if name != "temperature"]
    useless += [] if arguments.seed is None else ["seed"]
    if useless:
        raise bad_argument(
            "--" + useless[0].replace("_", "-"),
            getattr(arguments, useless[0]),
            "to be left out where no tokens are drawn",
            "pass a --temperature above 0",
        )
    return {}


def read_device(name: str) -> torch.device:
    """The named device; ValueError if there is none of that name here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise bad_argument("--device", name, f"a device of this machine ({first_line})", "use cpu") from error
    return device


def read_dtype(name: str) -> torch.dtype | None:
    """The named dtype; None for that of the files."""
    return None if name == "auto" else getattr(torch, name)
