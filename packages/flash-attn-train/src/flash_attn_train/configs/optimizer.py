"""Options of the optimizer group."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.option import option


@dataclass
class ParameterOverride:
    """Other settings for the parameters that a pattern matches. Of several that match, a later one wins."""

    pattern: str = option(
        "*", "shell-style pattern of whole parameter names, e.g. *.mixer.*; * stands for any text"
    )
    lr_multiplier: float | None = option(None, "factor on the rate; null: as without the override", above=0.0)
    weight_decay: float | None = option(None, "weight decay; null: as without the override", at_least=0.0)


@dataclass
class OptimizerConfig:
    """What every optimizer has. Biases, normalisation weights and embeddings are never decayed."""

    lr: float = option(1e-3, "peak learning rate", above=0.0)
    weight_decay: float = option(0.1, "weight decay of matrices", at_least=0.0)
    overrides: list[ParameterOverride] = option(
        [], "other rates or decay by name, e.g. [{pattern: '*.embeddings.*', lr_multiplier: 0.1}]"
    )


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW: decoupled weight decay."""

    beta1: float = option(0.9, "decay of the running mean of gradients", at_least=0.0, below=1.0)
    beta2: float = option(0.95, "decay of the running mean of squared gradients", at_least=0.0, below=1.0)
    eps: float = option(1e-8, "added to the denominator", above=0.0)
    mup_base_width: int | None = option(
        None,
        "muP: width of the model that lr was tuned on; hidden matrices' rate is scaled by base width / width; "
        "null: off",
        at_least=1,
    )


@dataclass
class AdamW8bitConfig(AdamWConfig):
    """AdamW with its running means in 8 bits, by bitsandbytes: 2 bytes per parameter instead of 8."""

    paged: bool = option(
        False, "keep the running means in memory that can move to the CPU when the GPU is full"
    )


@dataclass
class LambConfig(OptimizerConfig):
    """LAMB: AdamW whose step of each tensor is as long as the tensor's own norm. For very large batches."""

    beta1: float = option(0.9, "decay of the running mean of gradients", at_least=0.0, below=1.0)
    beta2: float = option(0.999, "decay of the running mean of squared gradients", at_least=0.0, below=1.0)
    eps: float = option(1e-6, "added to the denominator", above=0.0)
    adapt_undecayed: bool = option(
        False, "adapt the step length of tensors without weight decay (biases, norms, embeddings) too"
    )


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent. Weight decay is part of the gradient."""

    momentum: float = option(0.9, "share of the last step that is made again", at_least=0.0, below=1.0)
    nesterov: bool = option(False, "Nesterov's momentum: the gradient counts before the momentum does")


# Config group `optimizer`: name on the command line -> schema.
OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "adamw_8bit": AdamW8bitConfig,
    "lamb": LambConfig,
    "sgd": SGDConfig,
}
