"""Who competes in bench_training.py: a model with its optimizer, its training step, and where it waits for its turn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]  # tokens and labels, (B,S) int64
OURS, OURS_COMPILED = "ours", "ours, layers compiled"
THEIRS, THEIRS_MASKED = "transformers, compiled", "transformers, compiled, with its mask"


class Contestant:
    """A model with its optimizer, and one training step."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.loss = model, loss
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self._parked: Tensor | None = None

    def step(self, batches: list[Batch]) -> None:
        device = batches[0][0].device
        for tokens, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = self.loss(tokens, labels) / len(batches)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resting_bytes(self) -> int:
        """Weights and optimizer state: all that is there between two steps."""
        return sum(tensor.nbytes for tensor in self._resting())

    def park(self) -> None:
        """Moves weights and optimizer state to the CPU's memory; there is nothing on the device any more.

        The tensors stay the same objects, which compiled code and the optimizer know; only their storage is empty.
        The copy is in ordinary memory: two moves for each contestant do not pay for pinning it, and torch would round
        pinned memory up to powers of two and keep it for ever.
        """
        tensors = self._resting()
        sizes = [tensor.nbytes for tensor in tensors]
        self._parked = torch.empty(sum(sizes), dtype=torch.uint8)
        for tensor, copy in zip(tensors, self._parked.split(sizes), strict=True):
            storage = tensor.untyped_storage()
            assert storage.nbytes() == tensor.nbytes, "a parameter that is a view of something larger"
            copy.copy_(_bytes_of(storage))
            storage.resize_(0)

    def wake(self) -> None:
        """Undoes ``park``."""
        assert self._parked is not None
        tensors = self._resting()
        for tensor, copy in zip(tensors, self._parked.split([t.nbytes for t in tensors]), strict=True):
            storage = tensor.untyped_storage()
            storage.resize_(tensor.nbytes)
            _bytes_of(storage).copy_(copy)
        self._parked = None

    def _resting(self) -> list[Tensor]:
        states = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return [*self.model.parameters(), *states]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def ours(config: GPTConfig, device: str, *, compile_layers: bool = False) -> Contestant:
    model = GPTLMHeadModel(config, device=device)
    if compile_layers:
        for layer in model.transformer.layers:
            layer.compile()
    return Contestant(model, model.loss)


def theirs(config: GPTConfig, device: str, *, makes_mask: bool = False) -> Contestant:
    """transformers' model with SDPA attention, whole model and loss under torch.compile.

    Under torch.compile transformers always makes a mask, with which SDPA cannot take its flash kernel. All sequences
    here are whole, so the causal flag says the same: the attention function is registered under another name too, for
    which transformers makes no mask.
    """
    from flash_attn_models.gpt.hugging_face import config_to_hugging_face
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    fields = dict(config_to_hugging_face(config))
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            hf_config,
            attn_implementation="sdpa" if makes_mask else "sdpa_causal",
            dtype=torch.float32,
        )
    model.train()

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return Contestant(model, torch.compile(loss))


MAKERS: dict[str, Callable[[GPTConfig, str], Contestant]] = {
    OURS: ours,
    OURS_COMPILED: lambda config, device: ours(config, device, compile_layers=True),
    THEIRS: theirs,
    THEIRS_MASKED: lambda config, device: theirs(config, device, makes_mask=True),
}
