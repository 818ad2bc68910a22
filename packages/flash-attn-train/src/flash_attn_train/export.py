"""The command `flash-attn-export`: a trained model as a folder in Hugging Face layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attn_train import __version__
from flash_attn_train.command import command
from flash_attn_train.errors import CheckpointError, ConfigError, OutputError

if TYPE_CHECKING:
    import torch

    from flash_attn_train.restore import Restored
    from flash_attn_train.sequence_classifier import BertForSequenceClassification

_DTYPES = ("float32", "bfloat16", "float16")
_EPILOG = """examples:
  flash-attn-export runs/quickstart quickstart-hf
  flash-attn-export runs/owt/gpt2s/checkpoints/best.ckpt gpt2s-hf --dtype bfloat16

The folder has config.json, model.safetensors and, of a model of text, tokenizer.json with its tokenizer_config.json.
transformers' from_pretrained loads it, and so does flash_attn_models.load_pretrained.
"""


@command("flash-attn-export")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see :func:`~flash_attn_train.command.command`."""
    parser = argparse.ArgumentParser(
        prog="flash-attn-export",
        description="Writes a trained model as a folder in Hugging Face layout.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN", help="run folder (its last checkpoint), or checkpoint")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to write; must not exist, or be empty")
    parser.add_argument(
        "--trained-weights",
        action="store_true",
        help="of a checkpoint with averaged weights write those that were trained instead",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, if the run folder has none"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--version", action="version", version=f"flash-attn-export {__version__}")
    arguments = parser.parse_args(argv)
    import torch

    folder = export(
        arguments.source,
        arguments.folder,
        use_ema=not arguments.trained_weights,
        tokenizer=arguments.tokenizer,
        dtype=getattr(torch, arguments.dtype),
    )
    names = sorted(file.name for file in folder.iterdir())
    print(f"wrote {', '.join(names)} to {folder}")
    if "tokenizer.json" not in names and "vocab_size" in json.loads((folder / "config.json").read_text()):
        print(
            "It has no tokenizer, since the folder of its run is not there or has none: --tokenizer FILE gives one."
        )
    return 0


def export(
    source: str,
    folder: str | Path,
    *,
    use_ema: bool = True,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the model of a run or checkpoint as a Hugging Face folder, which appears complete or not at all.

    Args:
        source: run folder (its last checkpoint), or checkpoint, also one of many files.
        folder: to write.
        use_ema: take averaged weights where the checkpoint has them.
        tokenizer: tokenizer.json; None is the run's.
        dtype: of the weights; None is float32.

    Returns:
        The folder.

    Raises:
        CheckpointError: the source cannot be read, or is none of this package.
        ConfigError: the model cannot be expressed in Hugging Face layout.
        DataError: the tokenizer cannot be read.
        OutputError: the folder holds something, or cannot be written.
    """
    import torch

    from flash_attn_train.data.tokenizer import load_tokenizer
    from flash_attn_train.restore import restore
    from flash_attn_train.run_folder import find_checkpoint

    place = Path(folder).expanduser().absolute()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise OutputError(f"output folder: {place} holds something already; expected none, or an empty one.")
    if find_checkpoint(source) is None:
        raise CheckpointError(
            f"{source}: expected a run folder with checkpoints/last.ckpt, or a checkpoint of flash-attn-train."
        )
    if tokenizer is not None:
        load_tokenizer(tokenizer.expanduser())  # before the weights, which may take long
    restored = restore(source, use_ema=use_ema)
    file = restored.tokenizer if tokenizer is None else tokenizer.expanduser()
    restored.model.to(torch.float32 if dtype is None else dtype)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as temporary:
            written = Path(temporary) / "model"
            end_of_text = _write_tokenizer(Path(temporary), file, restored)
            _save(restored, written, end_of_text)
            for path in Path(temporary).glob("*.json"):
                shutil.move(path, written / path.name)
            written.replace(place)
    except OSError as error:
        raise OutputError(
            f"output folder: cannot write {place}: {error.strerror}. Choose another place."
        ) from error
    return place


def _save(restored: Restored, folder: Path, end_of_text: int | None) -> None:
    from flash_attn_models import save_pretrained
    from flash_attn_models.gpt import GPTLMHeadModel
    from flash_attn_models.vit import ViTForImageClassification

    from flash_attn_train.sequence_classifier import BertForSequenceClassification

    model: Any = restored.model
    if hasattr(model, "save_pretrained"):  # of transformers
        if end_of_text is not None:
            model.config.eos_token_id = model.generation_config.eos_token_id = end_of_text
        model.save_pretrained(folder)
        return
    if isinstance(model, GPTLMHeadModel) and end_of_text is not None:
        model.config = dataclasses.replace(model.config, bos_token_id=end_of_text, eos_token_id=end_of_text)
    if isinstance(model, ViTForImageClassification) and restored.label_names:
        model.config = dataclasses.replace(model.config, class_names=tuple(restored.label_names))
    try:
        if isinstance(model, BertForSequenceClassification):
            _save_sequence_classifier(model, folder, restored.label_names)
        else:
            save_pretrained(model, folder)
    except ValueError as error:
        raise ConfigError(f"model: it cannot be written in Hugging Face layout: {error}") from error


def _save_sequence_classifier(
    model: BertForSequenceClassification, folder: Path, label_names: Sequence[str]
) -> None:
    """The encoder as the models package writes it, and the head beside it under transformers' names."""
    from flash_attn_models import save_pretrained
    from safetensors.torch import load_file, save_file

    save_pretrained(model.bert, folder, max_shard_bytes=1 << 60)
    encoder = load_file(folder / "model.safetensors")
    tensors = {f"bert.{name}": tensor for name, tensor in encoder.items()}
    tensors |= {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    unnamed = (f"LABEL_{number}" for number in range(model.classifier.out_features))
    names = dict(enumerate(label_names or unnamed))
    fields |= {
        "architectures": ["BertForSequenceClassification"],
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _write_tokenizer(folder: Path, file: Path | None, restored: Restored) -> int | None:
    """tokenizer.json and tokenizer_config.json. Returns the token that ends a text; None without a tokenizer."""
    if restored.sizes.vocab_size == 0 or file is None:
        return None
    from flash_attn_train.data.special_tokens import special_tokens
    from flash_attn_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    special = special_tokens(tokenizer, end_of_text=restored.config.tokenizer.end_of_text)
    names = {
        "eos_token": special.end_of_text,
        "pad_token": special.pad,
        "cls_token": special.begin,
        "sep_token": special.separator,
        "mask_token": special.mask,
    }
    fields: dict[str, Any] = {
        name: tokenizer.id_to_token(number) for name, number in names.items() if number is not None
    }
    fields |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": getattr(restored.config.model, "max_seqlen", None),
        "clean_up_tokenization_spaces": False,
    }
    shutil.copyfile(file if file.is_file() else file / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return special.end_of_text


if __name__ == "__main__":
    sys.exit(main())
