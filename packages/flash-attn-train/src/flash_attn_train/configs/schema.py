"""The configuration of a run as typed dataclasses: every key, its type, default, meaning and allowed range.

These classes are the single truth. The command line, ``--help``, the checks and the saved ``config.yaml`` are
all derived from them. Sections with variants (which optimizer, which task, ...) have a base class, of which the
chosen entry of the config group of that name is a subclass; each is in a module of its own.
"""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass, field

from flash_attn_train.configs.callbacks import CallbacksConfig
from flash_attn_train.configs.data import DataConfig, TextDataConfig, TokenizerConfig
from flash_attn_train.configs.logger import LoggerConfig
from flash_attn_train.configs.metrics import MetricsConfig
from flash_attn_train.configs.model import GPTModelConfig, ModelConfig
from flash_attn_train.configs.optimizer import AdamWConfig, OptimizerConfig
from flash_attn_train.configs.option import option, read_with, unless, where
from flash_attn_train.configs.scheduler import CosineConfig, SchedulerConfig
from flash_attn_train.configs.strategy import SingleDeviceConfig, StrategyConfig
from flash_attn_train.configs.task import LanguageModelConfig, TaskConfig


@dataclass
class TrainerConfig:
    """Length, batch, devices and number format of the run."""

    max_steps: int = option(500, "optimizer steps; -1: as many as max_epochs takes", at_least=-1)
    max_epochs: float | None = option(
        None, "passes over the training data, a fraction too, with max_steps=-1; null: max_steps", above=0.0
    )
    batch_size: int = option(16, "samples per forward pass and device", at_least=1)
    global_batch_size: int | None = option(
        None,
        "samples per optimizer step, on all devices together: sets accumulate_grad_batches; null: as that says",
        at_least=1,
    )
    accumulate_grad_batches: int = option(1, "forward passes per optimizer step", at_least=1)
    gradient_clip_val: float = option(1.0, "largest gradient norm; 0: no clipping", at_least=0.0)
    val_every_n_steps: int = option(100, "steps between validations; one more runs before step 1", at_least=1)
    val_sequences: int | None = option(
        256, "held-out samples per validation, evenly spread; null: all of them", at_least=1
    )
    accelerator: str = option(
        "auto", "device; auto: cuda where there is one", choices=("auto", "cpu", "cuda")
    )
    devices: int = option(1, "devices per node, each with a process of its own", at_least=1)
    num_nodes: int = option(1, "machines", at_least=1)
    precision: str = option(
        "auto",
        "auto: bf16-mixed on a GPU that has bf16, else 32-true, with which attention takes the portable path",
        choices=("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    )
    compile: bool = option(False, "compile each layer with torch.compile")
    activation_checkpointing: str = option(
        "none",
        "compute again in the backward pass, to save memory: whole layers (a third more computation); or of a GPT "
        "only attention or only the MLP",
        choices=("none", "layers", "attention", "mlp"),
    )
    profiler: str = option(
        "none",
        "Lightning's profiler, which writes into profiler/ of the run folder: simple (time of each hook), advanced (of "
        "each Python function), pytorch (a trace of operators and kernels in a few steps, for Perfetto)",
        choices=("none", "simple", "advanced", "pytorch"),
    )
    nan: str = option(
        "stop", "at a loss that is not finite: stop the run, or skip the step", choices=("stop", "skip")
    )

    def __post_init__(self) -> None:
        # Earlier it was true or false; OmegaConf makes text of these.
        earlier = {"true": "layers", "false": "none"}
        given = str(self.activation_checkpointing)
        self.activation_checkpointing = earlier.get(given.lower(), given)


@dataclass
class CheckpointConfig:
    """checkpoints/last.ckpt (to resume from) and checkpoints/best.ckpt (lowest validation loss)."""

    every_n_steps: int = option(100, "steps between writes of last.ckpt", at_least=1)
    keep_every_n_steps: int | None = option(
        None, "steps between checkpoints that are kept for good, step-N.ckpt; null: none", at_least=1
    )
    keep_top_k: int = option(
        1,
        "how many checkpoints with the lowest validation losses are kept; the best is best.ckpt",
        at_least=1,
    )
    save_on_error: bool = option(
        True, "after an error leave interrupted.ckpt, the last complete step of a run of one process"
    )


_SAMPLED = unless("generation.temperature", equal=0.0)


@dataclass
class GenerationConfig:
    """The sample printed at the end."""

    prompt: str | None = option(None, "text to continue; null: one that suits the corpus")
    max_new_tokens: int = option(160, "tokens to generate; 0: no sample", at_least=0, off=0)
    temperature: float = option(0.8, "0: the most likely token always; higher: more varied", at_least=0.0)
    top_k: int | None = option(
        50, "sample from the k most likely tokens only; null: from all", _SAMPLED, at_least=1
    )
    top_p: float | None = option(
        None,
        "sample from the smallest set with this probability; null: from all",
        _SAMPLED,
        above=0.0,
        at_most=1.0,
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
    smoke: bool = option(
        False,
        "try everything out in seconds: a tiny model of the same kind, data that need no network, few steps",
    )
    task: TaskConfig = field(default_factory=LanguageModelConfig)
    model: ModelConfig = field(default_factory=GPTModelConfig)
    data: DataConfig = field(default_factory=TextDataConfig)
    tokenizer: TokenizerConfig = field(
        default_factory=TokenizerConfig,
        metadata=read_with(where("task", "language_model", "masked_lm", "sequence_classification")),
    )
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    scheduler: SchedulerConfig = field(default_factory=CosineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=SingleDeviceConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    generation: GenerationConfig = field(
        default_factory=GenerationConfig,
        metadata=read_with(
            where("task", "language_model"),
            where("model", "gpt"),
            unless("generation.max_new_tokens", equal=0),
        ),
    )
