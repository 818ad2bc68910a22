"""The command `flash-attn-evaluate`: measures a trained model on held-out data."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attn_train import __version__
from flash_attn_train.command import command
from flash_attn_train.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from flash_attn_train.configs import TokenizerConfig
    from flash_attn_train.data import DataModule
    from flash_attn_train.restore import Restored

_EPILOG = """examples:
  flash-attn-evaluate runs/quickstart
  flash-attn-evaluate runs/owt/gpt2s/checkpoints/best.ckpt data=wikitext103
  flash-attn-evaluate openai-community/gpt2 data=wikitext2 model.max_seqlen=1024 trainer.batch_size=4
  flash-attn-evaluate runs/imagenet/vit-small data.path=/data/imagenet-v2 --output v2.json

KEY=VALUE and GROUP=NAME are those of flash-attn-train. They change the config that is in the checkpoint; a group that
is named (data=wikitext2) is taken as a whole. All held-out samples are used unless trainer.val_sequences says how many.
Measured are loss (nats per target), and where they have a meaning perplexity, bits per byte of text, and accuracy.
"""


@command("flash-attn-evaluate")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see :func:`~flash_attn_train.command.command`."""
    parser = argparse.ArgumentParser(
        prog="flash-attn-evaluate",
        description="Measures a trained model on held-out data.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="MODEL",
        help="run folder (its last checkpoint), checkpoint, folder in Hugging Face layout, or name on the hub",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for flash-attn-train")
    parser.add_argument(
        "--trained-weights",
        action="store_true",
        help="of a checkpoint with averaged weights measure those that were trained instead",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result here, as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument("--version", action="version", version=f"flash-attn-evaluate {__version__}")
    arguments = parser.parse_intermixed_args(argv)
    _check_output(arguments.output)
    result = evaluate(arguments.source, arguments.overrides, use_ema=not arguments.trained_weights)
    if arguments.output is not None:
        _write(arguments.output, result)
    print(json.dumps(result, indent=2) if arguments.json else describe(result))
    return 0


def evaluate(source: str, overrides: Sequence[str] = (), *, use_ema: bool = True) -> dict[str, Any]:
    """Measures a model on the validation data of its config, or of the config that overrides make of it.

    Args:
        source, overrides, use_ema: see :func:`flash_attn_train.restore.restore`.

    Returns:
        "metrics": name -> value, such as "loss" (nats per target), "perplexity", "bits_per_byte", "accuracy"; what was
        measured: "source", "checkpoint", "step", "weights"; on what: "data", "num_samples", "precision"; "seconds".

    Raises:
        UserError: the source or the data cannot be read, or do not fit each other.
    """
    from flash_attn_train.data import build_data
    from flash_attn_train.device import resolve
    from flash_attn_train.restore import restore
    from flash_attn_train.tasks import build_task
    from flash_attn_train.trainer import quiet_lightning

    restored = restore(source, overrides, use_ema=use_ema)
    config = resolve(restored.config)
    data = build_data(config)
    _check_sizes(restored.sizes.vocab_size, data.vocab_size, restored.sizes.num_classes, data.num_classes)
    _check_tokenizer(restored, config.tokenizer, data)
    _check_labels(restored.label_names, data.label_names)
    task = build_task(config, restored.sizes)
    task.model = restored.model
    started = time.perf_counter()
    with quiet_lightning():
        trainer = _trainer(config)
        trainer.validate(task, data, verbose=False)
    metrics = {
        name.removeprefix("val/"): float(value)
        for name, value in sorted(trainer.callback_metrics.items(), key=lambda item: item[0] != "val/loss")
        if name.startswith("val/")
    }
    if data.val_bytes_per_token is not None and config.metrics.bits_per_byte:
        from flash_attn_train.metrics import bits_per_byte

        metrics["bits_per_byte"] = bits_per_byte(metrics["loss"], data.val_bytes_per_token)
    return {
        "source": source,
        "checkpoint": None if restored.checkpoint is None else str(restored.checkpoint),
        "step": restored.step,
        "weights": restored.weights,
        "metrics": metrics,
        "data": data.describe(),
        "num_samples": len(data.validation_samples),
        "precision": config.trainer.precision,
        "seconds": time.perf_counter() - started,
    }


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    source = result["checkpoint"] or result["source"]
    step = "" if result["step"] is None else f", step {result['step']:,}"
    lines = [f"{'model':<16} {source}{step}, {result['weights']} weights"]
    lines += [f"{name:<16} {text}" for name, text in result["data"].items()]
    lines += [f"{'measured':<16} {result['num_samples']:,} samples in {result['precision']}"]
    lines += [f"{name:<16} {_number(name, value)}" for name, value in result["metrics"].items()]
    return "\n".join(lines)


def _number(name: str, value: float) -> str:
    return f"{value:.2%}" if name.startswith("accuracy") else f"{value:.4f}"


def _trainer(config: Any) -> Any:
    import pytorch_lightning as pl

    return pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        inference_mode=False,  # as in training: what a model keeps from a first pass may be used in it
    )


def _check_sizes(vocab_size: int, data_vocab_size: int, num_classes: int, data_num_classes: int) -> None:
    if data_vocab_size > vocab_size > 0:
        raise ConfigError(
            f"tokenizer: got a vocabulary of {data_vocab_size:,}, but the model has {vocab_size:,} tokens. Give the "
            "tokenizer that the model was trained with: tokenizer.path=TOKENIZER_JSON or tokenizer.name."
        )
    if num_classes != data_num_classes:
        raise ConfigError(
            f"data: got {data_num_classes:,} classes, but the model has {num_classes:,}. Give data with the classes "
            "that the model was trained on."
        )


def _check_tokenizer(restored: Restored, config: TokenizerConfig, data: DataModule) -> None:
    """One that is trained here is the model's on the model's own data alone; elsewhere its tokens mean other text."""
    is_trained_here = data.vocab_size > 0 and config.name is None and config.path is None
    if is_trained_here and data.key != restored.data_key:
        raise ConfigError(
            "tokenizer: got one that was trained on these data, but the model has another, and the folder of its run "
            "is not where it would be. Give the run's: tokenizer.path=TOKENIZER_JSON."
        )


def _check_labels(names: Sequence[str], data_names: Sequence[str]) -> None:
    """As many classes of other names would be measured by numbers that mean something else."""
    differing = [(ours, theirs) for ours, theirs in zip(names, data_names, strict=False) if ours != theirs]
    if differing:
        ours, theirs = differing[0]
        raise ConfigError(
            f"data: got classes of other names than the model was trained on, such as {theirs!r} in place of {ours!r} "
            f"({len(differing):,} of {len(names):,} differ); expected the same, since classes are numbered in the "
            "order of their names. Name the data's classes as the training data's."
        )


def _check_output(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise OutputError(f"--output: got {path}, expected a file in a folder that exists.")


def _write(path: Path, result: dict[str, Any]) -> None:
    from flash_attn_train.atomic import atomic_write

    try:
        with atomic_write(path) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"--output: cannot write {path}: {error.strerror}. Choose another place."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
