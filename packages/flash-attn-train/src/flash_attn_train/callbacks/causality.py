"""Whether a language model looks into the future."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flash_attn_train.console import say
from flash_attn_train.errors import ConfigError, TrainingError


class CausalityMonitor(pl.Callback):
    """Checks at every validation that no output depends on a later input, and logs ``val/causality_leak``.

    One random sequence goes through the model, in evaluation mode and the precision of the run. The gradients of the
    outputs at the first, a middle and the last but one position with respect to the embeddings of all later positions
    must be exactly zero; the largest magnitude is logged. Weights, their gradients and the random generators are left
    alone. Skipped, with a line that says so, where the weights are sharded (FSDP2, tensor parallelism).

    Args:
        on_leak: "raise" stops the run with :class:`TrainingError`, "log" goes on.
    """

    def __init__(self, on_leak: str = "raise") -> None:
        self.on_leak = on_leak

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_sharded(pl_module) and trainer.is_global_zero:
            say("causality is not checked: the weights are sharded")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self._is_sharded(pl_module):
            return
        model, seqlen = pl_module.model, int(pl_module.tokens_per_sample)  # type: ignore[arg-type]
        with trainer.precision_plugin.forward_context():
            leak = largest_leak(model, seqlen)  # type: ignore[arg-type]
        pl_module.log("val/causality_leak", leak, logger=False)
        if leak > 0 and self.on_leak == "raise":
            raise TrainingError(
                f"an output depends on later inputs: its gradient is {leak:.3g}, expected 0. The model is not causal: "
                "it would learn to copy. callbacks.causality.on_leak=log goes on nevertheless."
            )

    @staticmethod
    def _is_sharded(pl_module: pl.LightningModule) -> bool:
        mesh = getattr(pl_module, "device_mesh", None)
        return mesh is not None or any(isinstance(p, DTensor) for p in pl_module.parameters())


def largest_leak(model: nn.Module, seqlen: int) -> float:
    """The largest gradient of an output with respect to a later input of a language model: 0 if it is causal.

    Args:
        model: takes token ids (1,S) and returns logits (1,S,V), or an object that has ``logits``.
        seqlen: S; with 1 there is no later input.

    Raises:
        ConfigError: no token embedding is found in the model, or the output does not depend on the input at all.
    """
    if seqlen < 2:
        return 0.0
    embedding = _token_embedding(model)
    weight = embedding.weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding.num_embeddings, (1, seqlen), generator=generator).to(weight.device)
    inputs: list[Tensor] = []

    def cut(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if inputs:  # a tied module may be used again
            return None
        inputs.append(output.detach().requires_grad_())
        return inputs[0]

    was_training = model.training
    handle = embedding.register_forward_hook(cut)
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            output = model(tokens)
            logits: Tensor = output if isinstance(output, Tensor) else output.logits
            # Not a plain sum, whose gradient behind a normalisation can be zero.
            mix = torch.randn(logits.shape[-1], generator=generator).to(logits)
            leaks, direct = [], []
            for position in sorted({0, (seqlen - 1) // 2, seqlen - 2}):
                (gradient,) = torch.autograd.grad(logits[0, position] @ mix, inputs[0], retain_graph=True)
                leaks.append(gradient[0, position + 1 :].abs().max())
                direct.append(gradient[0, position].abs().max())
    finally:
        handle.remove()
        model.train(was_training)
    if float(torch.stack(direct).max()) == 0.0:
        raise ConfigError(
            "callbacks.causality.enabled: got true, but the model's output does not depend on its input. Set it to "
            "false."
        )
    return float(torch.stack(leaks).max())


def _token_embedding(model: nn.Module) -> nn.Embedding:
    if hasattr(model, "get_input_embeddings"):  # transformers
        return model.get_input_embeddings()  # type: ignore[operator]
    for module in model.modules():  # the first one: that of tokens comes before that of positions
        if isinstance(module, nn.Embedding):
            return module
    raise ConfigError(
        "callbacks.causality.enabled: got true, but the model has no token embedding. Set it to false."
    )
