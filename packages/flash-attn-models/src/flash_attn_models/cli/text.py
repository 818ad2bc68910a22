"""Between text and token ids: Hugging Face's tokenizers, or none, and text that grows token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.repositories import REPOSITORIES


class TextCodec(Protocol):
    """Makes ids of a prompt, and text of ids."""

    eos_ids: tuple[int, ...]

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; ValueError if there are none."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


class IdCodec:
    """Prompts and results are ids, separated by spaces or commas."""

    eos_ids: tuple[int, ...] = ()

    def encode(self, prompt: str) -> list[int]:
        try:
            ids = [int(word) for word in prompt.replace(",", " ").split()]
        except ValueError:
            ids = []
        if not ids:
            raise bad_argument(
                "prompt",
                repr(prompt[:80]),
                "token ids such as '12 7 99' with --ids",
                "leave out --ids for text",
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)


class HuggingFaceCodec:
    """A tokenizer of transformers.

    Args:
        model: folder or name, as ``from_pretrained`` takes it.
        is_chat: prompts are messages of a user, to be put in the tokenizer's chat template.
    """

    def __init__(self, model: str, is_chat: bool) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise bad_argument(
                "tokenizer",
                "no package transformers",
                "transformers, which reads the model's tokenizer",
                "pip install 'flash-attn-models[transformers]', or pass token ids with --ids",
            ) from error
        place = model if Path(model).is_dir() else REPOSITORIES.get(model, model)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise bad_argument(
                "tokenizer",
                f"none that can be read from {model} ({first_line})",
                "tokenizer.json or another tokenizer beside the model",
                "save the tokenizer in that folder, or pass token ids with --ids",
            ) from error
        if is_chat and self._tokenizer.chat_template is None:
            raise bad_argument(
                "--chat", f"{model} without a chat template", "a model trained to chat", "leave out --chat"
            )
        self._is_chat = is_chat
        eos_id = self._tokenizer.eos_token_id
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    def encode(self, prompt: str) -> list[int]:
        if self._is_chat:
            message = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(prompt)["input_ids"]
        if not ids:
            raise bad_argument("prompt", repr(prompt), "a text that has tokens", "write more of it")
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class GrowingText:
    """Text of ids that come one by one, in pieces that can be printed at once.

    What a token stands for depends on its neighbours, so that a few tokens are decoded with and without the new ones,
    and the difference is new text; a character whose last bytes have not come yet is held back.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._shown: list[int] = []  # the last ids whose text is out, as context
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that can be printed now that ``token`` has come."""
        self._new.append(token)
        return self._flush(at_end=False)

    def finish(self) -> str:
        """What was held back."""
        return self._flush(at_end=True)

    def _flush(self, at_end: bool) -> str:
        before = self._codec.decode(self._shown)
        after = self._codec.decode(self._shown + self._new)
        if not at_end and (len(after) <= len(before) or after.endswith("\ufffd")):
            return ""
        self._shown, self._new = self._new or self._shown, []
        return after[len(before) :]
