"""Our modules in place of a transformers model's own: in one model, undone by ``restore``.

Parameters stay the same objects under the same names, so that checkpoints, optimisers and tied weights go on as before.
A module is replaced if ours computes the same: that is tried on numbers, since names of classes say too little (the
RMSNorm of Gemma adds 1 to its weight).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flash_attn_ops.activations import ACTIVATIONS, gated
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.norm import LayerNorm, RMSNorm
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Replacement:
    """What was replaced in one model, and the way back.

    Attributes:
        replaced: what it was, by the names of the modules in the model.
    """

    def __init__(self, replaced: Mapping[str, Any], undo: Callable[[], None]) -> None:
        self.replaced = dict(replaced)
        self._undo: Callable[[], None] | None = undo

    def restore(self) -> None:
        """Put everything back. A second call does nothing."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def __repr__(self) -> str:
        return f"Replacement({', '.join(self.replaced) or 'nothing'})"


def replace_norms(model: nn.Module) -> Replacement:
    """Replace every LayerNorm and RMSNorm that has ours as its equal. Others, and those with hooks, stay.

    Raises ValueError for a model on the meta device, which has no numbers to compare.
    """
    return _replace_modules(model, _norm_like)


def replace_mlps(model: nn.Module) -> Replacement:
    """Replace the MLPs ``down_proj(activation(gate_proj(x)) * up_proj(x))``: activation and product become one pass.

    Raises ValueError for a model on the meta device, which has no numbers to compare.
    """
    return _replace_modules(model, _mlp_like)


def replace_loss(model: nn.Module) -> Replacement:
    """Let a causal language model of transformers compute its loss by our cross-entropy: one pass over the logits.

    Raises ValueError for a model whose loss is another.
    """
    if getattr(model, "loss_type", None) != "ForCausalLM" or "logits" not in _argument_names(model):
        raise bad_argument(
            "model",
            f"a {type(model).__name__}",
            "a causal language model of transformers, with its usual loss",
            "leave the loss of this model as it is",
        )
    own: Any = model
    before = own.loss_function
    was_set = "_loss_function" in vars(model)
    own.loss_function = causal_lm_loss

    def undo() -> None:
        if was_set:
            own.loss_function = before
        else:
            del own._loss_function

    return Replacement({"loss_function": before}, undo)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """transformers' loss of a causal language model, a fp32 scalar.

    Args:
        logits: (B, S, vocab_size).
        labels: int64 (B, S), the tokens themselves; token i is what logits i - 1 predict.
        num_items_in_batch: the sum over tokens is divided by this; None is their mean.
        ignore_index: label that does not count.
        shift_labels: instead of labels: what logits i predict.
        others: what other models' losses are given, without meaning here.
    """
    if shift_labels is None:
        if labels is None:
            raise bad_argument("labels", None, "int64 (batch, seqlen)", "pass labels or shift_labels")
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss: Tensor = cross_entropy(
        logits.reshape(-1, vocab_size),
        shift_labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if isinstance(num_items_in_batch, Tensor):  # of a model over several devices it may be on another one
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class _GatedMLP(nn.Module):
    """The same three projections, with activation and product in one pass."""

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        super().__init__()
        for name in _PROJECTIONS:
            self.add_module(name, mlp.get_submodule(name))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in _PROJECTIONS)
        out: Tensor = down(gated(gate(x), up(x), activation=self.activation))
        return out


def _replace_modules(model: nn.Module, ours_for: Callable[[nn.Module], nn.Module | None]) -> Replacement:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise bad_argument("model", "parameters on the meta device", "a model with weights", "load it first")
    replaced: dict[str, nn.Module] = {}
    made: dict[nn.Module, nn.Module | None] = {}
    for parent_name, parent in list(model.named_modules()):
        for name, old in list(parent._modules.items()):  # named_children leaves out a module's second name
            if old is None:
                continue
            if old not in made:
                made[old] = None if _has_hooks(old) else ours_for(old)
            new = made[old]
            if new is not None:
                setattr(parent, name, new.train(old.training))
                replaced[f"{parent_name}.{name}".lstrip(".")] = old

    def undo() -> None:
        for path, old in replaced.items():
            parent_name, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, name, old.train(parent.get_submodule(name).training))

    return Replacement(replaced, undo)


def _has_hooks(module: nn.Module) -> bool:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
    )
    return any(getattr(module, kind) for kind in kinds) or "forward" in vars(module)


def _norm_like(old: nn.Module) -> nn.Module | None:
    """Our norm with the parameters of this one, if it is one of ours."""
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    names = {name for name, _ in old.named_parameters(recurse=False)}
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not names <= {"weight", "bias"}:
        return None
    is_layer_norm = type(old) is nn.LayerNorm
    if not is_layer_norm and ("RMSNorm" not in type(old).__name__ or isinstance(old, RMSNorm)):
        return None
    eps = next((getattr(old, name) for name in _EPS_NAMES if hasattr(old, name)), None)
    if eps is None and isinstance(old, nn.RMSNorm):
        eps = torch.finfo(weight.dtype).eps
    if any(old.children()) or not isinstance(eps, float):
        return None
    options: dict[str, Any] = {"eps": eps, "device": "meta", "dtype": weight.dtype}
    if not is_layer_norm and bias is not None:
        return None
    for zero_centered in (False, True):
        options["zero_centered_weight"] = zero_centered
        new: LayerNorm | RMSNorm
        if is_layer_norm:
            new = LayerNorm(weight.numel(), bias=bias is not None, **options)
            new.bias = bias
        else:
            new = RMSNorm(weight.numel(), **options)
        new.weight = weight
        if _agree(
            _with_odd_weights(old), _with_odd_weights(new), weight.numel(), weight.device, torch.float32
        ):
            return new
    return None


def _mlp_like(old: nn.Module) -> nn.Module | None:
    """Our MLP with the projections of this one, if it is nothing else."""
    children = dict(old.named_children())
    act = getattr(old, "act_fn", None)
    if set(children) - {"act_fn"} != set(_PROJECTIONS) or not callable(act):
        return None
    gate = children["gate_proj"]
    if type(gate) is not nn.Linear or any(True for _ in old.parameters(recurse=False)):
        return None
    for activation in ACTIVATIONS:
        new = _GatedMLP(old, activation)
        place = (gate.in_features, gate.weight.device, gate.weight.dtype)
        if _agree(_of_gate(act), _of_gate(_Activate(activation)), *place) and _agree(old, new, *place):
            return new
    return None


class _Activate(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = gated(x, torch.ones_like(x), activation=self.activation)
        return out


def _of_gate(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # In float32, where exact and approximate GELU differ by more than the comparison allows.
    return lambda x: act(x.float() * 3)


@torch.no_grad()
def _with_odd_weights(norm: nn.Module) -> nn.Module:
    """A copy in float32, with numbers as weights: those of a new model, all one, say little of what they do."""
    norm = copy.deepcopy(norm).float()
    for parameter in norm.parameters():
        parameter.copy_(torch.linspace(-0.7, 1.9, parameter.numel()))
    return norm


@torch.no_grad()
def _agree(
    old: Callable[[Tensor], Tensor],
    new: Callable[[Tensor], Tensor],
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether both give the same for numbers of usual size, and for small ones, which show eps."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 1.0, 1e-3, 10.0])[:, None]
    x = (torch.randn(4, width, generator=generator) * scales + 0.1 * scales).to(device, dtype)
    expected, got = old(x), new(x)
    if expected.shape != got.shape:
        return False
    tolerance = 1e-5 if expected.dtype.itemsize >= 4 else 4 * torch.finfo(expected.dtype).eps
    error = (expected.float() - got.float()).abs().amax(-1)
    return bool((error <= tolerance * expected.float().abs().amax(-1) + 1e-12).all())


def _argument_names(model: nn.Module) -> set[str]:
    loss = getattr(model, "loss_function", None)
    code = getattr(loss, "__code__", None)
    return set() if code is None else set(code.co_varnames[: code.co_argcount])
