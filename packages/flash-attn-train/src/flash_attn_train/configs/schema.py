"""The configuration of a run as typed dataclasses: every key, its type, default, meaning and allowed range.

These classes are the single truth. The command line, ``--help``, the checks and the saved ``config.yaml`` are
all derived from them.
"""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its meaning and any of the limits at_least, above, at_most, below, choices."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class DataConfig:
    """Which text is trained on."""

    path: str | None = option(
        None, "text file, or folder read recursively; null: the source of Python's standard library"
    )
    suffixes: list[str] = field(
        default_factory=list,
        metadata={"help": "in a folder, read only names with these endings, e.g. [.txt,.md]; []: all text"},
    )
    val_fraction: float = option(0.05, "share of the files held out for validation", above=0.0, below=1.0)
    cache_dir: str | None = option(
        None, "where tokenizers and token files are kept; null: flash-attn-train in the user's cache folder"
    )
    num_workers: int = option(
        0, "processes that assemble batches; 0: the training process itself", at_least=0
    )


@dataclass
class TokenizerConfig:
    """Byte-level BPE, trained on the training split."""

    vocab_size: int = option(
        4096, "largest vocabulary, end-of-text token included", at_least=257, at_most=2**31 - 1
    )
    min_frequency: int = option(2, "pairs seen less often are never merged", at_least=1)


@dataclass
class ModelConfig:
    """The transformer. The vocabulary size comes from the tokenizer."""

    max_seqlen: int = option(256, "context length in tokens, in training and generation", at_least=2)
    n_layer: int = option(4, "transformer blocks", at_least=1)
    n_head: int = option(4, "query heads; the CUDA kernels take d_model / n_head of 64 or 128", at_least=1)
    n_head_kv: int | None = option(None, "key and value heads, a divisor of n_head; null: n_head", at_least=1)
    d_model: int = option(256, "width of the residual stream", at_least=1)
    d_inner: int | None = option(
        None, "width inside the MLP; null: the architecture's usual multiple", at_least=1
    )
    activation: str = option("gelu_tanh", "MLP activation", choices=("gelu_tanh", "gelu", "relu", "swiglu"))
    norm: str = option("layer_norm", "normalisation", choices=("layer_norm", "rms_norm"))
    norm_eps: float = option(1e-5, "added to the variance in the normalisation", above=0.0)
    position: str = option("learned", "position information", choices=("learned", "rotary"))
    rotary_base: float = option(10000.0, "base of the rotary frequencies", above=0.0)
    qkv_bias: bool = option(True, "bias in the query, key and value projections")
    out_bias: bool = option(True, "bias in the attention output projection")
    mlp_bias: bool = option(True, "bias in the MLP")
    tie_embeddings: bool = option(True, "output layer shares the token embedding")
    dropout: float = option(0.0, "dropout on embeddings and residual branches", at_least=0.0, below=1.0)
    attn_dropout: float = option(0.0, "dropout on attention probabilities", at_least=0.0, below=1.0)
    initializer_range: float = option(0.02, "standard deviation of the initial weights", above=0.0)


@dataclass
class OptimizerConfig:
    """AdamW. Biases, normalisation weights and embeddings are never decayed."""

    lr: float = option(1e-3, "peak learning rate", above=0.0)
    beta1: float = option(0.9, "decay of the running mean of gradients", at_least=0.0, below=1.0)
    beta2: float = option(0.95, "decay of the running mean of squared gradients", at_least=0.0, below=1.0)
    eps: float = option(1e-8, "added to the denominator", above=0.0)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", at_least=0.0)


@dataclass
class SchedulerConfig:
    """Linear warmup, then cosine decay."""

    warmup_steps: int | None = option(
        None, "steps in which the rate rises to the peak; null: a tenth of the schedule", at_least=0
    )
    decay_steps: int | None = option(
        None, "step at which the lowest rate is reached; null: trainer.max_steps", at_least=1
    )
    min_lr_ratio: float = option(0.1, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


@dataclass
class TrainerConfig:
    """Length, batch, device and number format of the run."""

    max_steps: int = option(500, "optimizer steps", at_least=1)
    batch_size: int = option(16, "sequences per forward pass", at_least=1)
    accumulate_grad_batches: int = option(1, "forward passes per optimizer step", at_least=1)
    gradient_clip_val: float = option(1.0, "largest gradient norm; 0: no clipping", at_least=0.0)
    val_every_n_steps: int = option(100, "steps between validations; one more runs before step 1", at_least=1)
    val_sequences: int | None = option(
        256, "held-out sequences per validation, evenly spread; null: all of them", at_least=1
    )
    accelerator: str = option(
        "auto", "device; auto: cuda where there is one", choices=("auto", "cpu", "cuda")
    )
    precision: str = option(
        "auto",
        "auto: bf16-mixed on a GPU that has bf16, else 32-true, with which attention takes the portable path",
        choices=("auto", "32-true", "bf16-mixed", "16-mixed"),
    )


@dataclass
class LoggingConfig:
    """metrics.csv is always written."""

    every_n_steps: int = option(
        10, "steps between records of training loss, rate, gradient norm and speed", at_least=1
    )
    tensorboard: bool = option(True, "also write TensorBoard event files")


@dataclass
class CheckpointConfig:
    """checkpoints/last.ckpt (to resume from) and checkpoints/best.ckpt (lowest validation loss)."""

    every_n_steps: int = option(100, "steps between writes of last.ckpt", at_least=1)


@dataclass
class GenerationConfig:
    """The sample printed at the end."""

    prompt: str | None = option(None, "text to continue; null: one that suits the corpus")
    max_new_tokens: int = option(160, "tokens to generate; 0: no sample", at_least=0)
    temperature: float = option(0.8, "0: the most likely token always; higher: more varied", at_least=0.0)
    top_k: int | None = option(50, "sample from the k most likely tokens only; null: from all", at_least=1)
    top_p: float | None = option(
        None, "sample from the smallest set with this probability; null: from all", above=0.0, at_most=1.0
    )


@dataclass
class TrainConfig:
    """A whole run."""

    output_dir: str = option(
        "runs/train", "run folder; if it holds a run already, a numbered sibling is made"
    )
    resume: str = option(
        "false",
        "true: the newest run of output_dir; auto: the same, if there is one; or a checkpoint or run folder",
    )
    seed: int = option(
        0, "seed of initial weights, batch order, dropout and sample", at_least=0, at_most=2**32 - 1
    )
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
