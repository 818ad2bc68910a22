"""What a run tells its user: the opening lines, the loss curve as a picture, and the closing lines."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from flash_attn_models.attention import attention_path
from flash_attn_models.gpt import GPTLMHeadModel

from flash_attn_train.atomic import atomic_write
from flash_attn_train.configs import TrainConfig
from flash_attn_train.console import duration
from flash_attn_train.data import Corpus, PreparedData
from flash_attn_train.device import compute_dtype, describe_device
from flash_attn_train.loggers import read_metrics


def describe_run(
    config: TrainConfig, corpus: Corpus, data: PreparedData, model: GPTLMHeadModel
) -> dict[str, str]:
    """What a user wants to know before the wait, of a (resolved) config: name -> text."""
    shape, settings = config.model, config.trainer
    path = attention_path(
        model.config, seqlen=shape.max_seqlen, device=settings.accelerator, dtype=compute_dtype(config)
    )
    tokens_per_step = settings.batch_size * settings.accumulate_grad_batches * shape.max_seqlen
    splits = ", ".join(
        f"{len(documents)} documents ({corpus.num_bytes[name] / 1e6:.1f} MB) {use}"
        for name, documents, use in (
            ("train", corpus.train, "to train on"),
            ("validation", corpus.validation, "held out"),
        )
    )
    if corpus.skipped:
        splits += f", {len(corpus.skipped)} files skipped (not UTF-8 text), e.g. {corpus.skipped[0]}"
    return {
        "device": f"{describe_device(config)}, precision {settings.precision}",
        "attention": str(path).removeprefix("attention path: "),
        "corpus": f"{corpus.title}: {splits}",
        "tokens": f"{len(data.train):,} to train on, {len(data.validation):,} held out, vocabulary of "
        f"{data.vocab_size:,}{' (from the cache)' if data.from_cache else ''}",
        "model": f"{sum(p.numel() for p in model.parameters()):,} parameters, {shape.n_layer} layers, width "
        f"{shape.d_model}, {shape.n_head} heads, context {shape.max_seqlen}",
        "training": f"{settings.max_steps:,} steps of {tokens_per_step:,} tokens",
    }


@dataclass(frozen=True)
class RunResult:
    """What came out of a run. Losses in nats per token; speed is of this process, without validation."""

    folder: Path
    first_val_loss: float
    last_val_loss: float
    last_val_perplexity: float
    last_val_bits_per_byte: float
    tokens: int
    seconds: float
    last_checkpoint: Path
    best_checkpoint: Path
    picture: Path
    sample: str

    def __str__(self) -> str:
        speed = f"{self.tokens / self.seconds:,.0f} tokens/s" if self.tokens else "nothing left to train"
        lines = [
            f"validation loss  {self.first_val_loss:.3f} -> {self.last_val_loss:.3f} nats per token "
            f"(perplexity {self.last_val_perplexity:.1f}, {self.last_val_bits_per_byte:.3f} bits per byte)",
            f"speed            {speed} in training ({self.tokens:,} tokens in {duration(self.seconds)})",
            f"checkpoints      {self.last_checkpoint}, {self.best_checkpoint.name} beside it",
            f"loss curve       {self.picture}",
        ]
        if self.sample:
            lines += ["sample", *(f"    {line}".rstrip() for line in self.sample.splitlines())]
        return "\n".join(lines)


def draw_loss_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Training and validation loss over steps, from a metrics file, as PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = {"train/loss": ("training (one batch)", "-", "", 1.0), "val/loss": ("validation", "-", "o", 2.0)}
    for column, (label, line, marker, width) in styles.items():
        points = [(row["step"], row[column]) for row in rows if column in row]
        axes.plot(*zip(*points, strict=True), linestyle=line, marker=marker, linewidth=width, label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with atomic_write(picture) as file:
        file.write(image.getvalue())
