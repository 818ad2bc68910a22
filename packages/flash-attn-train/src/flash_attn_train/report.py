"""What a run leaves to look at: the loss curve as a picture, and the closing lines."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from flash_attn_train.atomic import atomic_write
from flash_attn_train.console import duration
from flash_attn_train.loggers import read_metrics


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

    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = {"train/loss": ("training (one batch)", "-", "", 1.0), "val/loss": ("validation", "-", "o", 2.0)}
    for column, (label, line, marker, width) in styles.items():
        points = [(row["step"], row[column]) for row in rows if column in row]
        axes.plot(*zip(*points, strict=True), linestyle=line, marker=marker, linewidth=width, label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with atomic_write(picture) as file:
        file.write(image.getvalue())
