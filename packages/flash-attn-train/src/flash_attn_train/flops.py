"""How many operations a training step of a model takes, and how many a device can do.

Convention of "model FLOPs", for MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv:2204.02311, appendix B)::

    FLOPs per token, forward and backward = 6 N + 12 L H Q T

N: weights of the matrices that a token is multiplied with: projections of attention, MLP, and the output layer (also
where it is tied to the embedding). Embeddings, which are looked up, biases and norms do not count. L layers, H query
heads of width Q, T tokens that a token attends to: the sequence length, whether or not attention is causal (not
halved); in layers with a window, at most the window. A multiply-add is two FLOPs. What is computed again with
activation checkpointing is not counted: it is no work that the model needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from flash_attn_models.bert import BertForMaskedLM
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.vit import ViTForImageClassification
from torch import nn

from flash_attn_train.sequence_classifier import BertForSequenceClassification

# Backward takes two products for each one of forward.
_TRAINING = 3


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, each counted once: all, those that are trained, and those of embeddings."""

    total: int
    trainable: int
    embeddings: int


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts the whole model, also where this process has a part of it as DTensors; other parts count as they are."""
    parameters = list(model.parameters())
    embeddings = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return ParameterCounts(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        embeddings=sum(p.numel() for p in embeddings.values()),
    )


@singledispatch
def flops_per_sample(model: nn.Module, seqlen: int, *, target_share: float = 1.0) -> int | None:
    """FLOPs of one sample in training, forward and backward, in the convention above.

    GPT, BERT and ViT by formula. Of other models, the forward pass on token ids is counted by
    torch.utils.flop_counter, on device "meta", and taken three times.

    Args:
        model: the whole model.
        seqlen: tokens of a sample; not used for images.
        target_share: share of the tokens for which the output layer is computed.

    Returns:
        The count; None for another model that does not run on device "meta", or is sharded.
    """
    return _measured(model, seqlen)


@flops_per_sample.register
def _(model: GPTLMHeadModel, seqlen: int, *, target_share: float = 1.0) -> int:
    shape = model.config
    heads = shape.n_head * shape.head_dim
    attention = shape.d_model * (2 * heads + 2 * shape.num_heads_kv * shape.head_dim)
    mlp = (3 if shape.activation == "swiglu" else 2) * shape.d_model * shape.inner_dim
    output = shape.embedding_dim * shape.vocab_size
    if shape.d_embedding is not None:
        output += 2 * shape.d_embedding * shape.d_model  # project_in and project_out
    seen = sum(min(seqlen, shape.window_of(layer) or seqlen) for layer in range(shape.n_layer))
    per_token = 2 * shape.n_layer * (attention + mlp) + 2 * target_share * output + 4 * heads * seen
    return round(_TRAINING * seqlen * per_token)


@flops_per_sample.register
def _(model: BertForMaskedLM, seqlen: int, *, target_share: float = 1.0) -> int:
    shape = model.config
    output = shape.d_model * (shape.d_model + shape.vocab_size)  # dense and decoder of the head
    encoder = _encoder(shape.n_layer, shape.d_model, shape.inner_dim, seqlen)
    return round(_TRAINING * seqlen * (encoder + 2 * target_share * output))


@flops_per_sample.register
def _(model: BertForSequenceClassification, seqlen: int, *, target_share: float = 1.0) -> int:
    shape = model.config
    encoder = _encoder(shape.n_layer, shape.d_model, shape.inner_dim, seqlen)
    pooler_and_head = 2 * (shape.d_model**2 + model.classifier.weight.numel())
    return _TRAINING * (seqlen * encoder + pooler_and_head)


@flops_per_sample.register
def _(model: ViTForImageClassification, seqlen: int, *, target_share: float = 1.0) -> int:
    shape = model.config
    patches, (rows, columns) = shape.n_tokens - shape.n_prefix, shape.patch_pair
    embedding = 2 * patches * shape.n_channels * rows * columns * shape.d_model
    encoder = shape.n_tokens * _encoder(shape.n_layer, shape.d_model, shape.inner_dim, shape.n_tokens)
    return _TRAINING * (embedding + encoder + 2 * shape.d_model * shape.n_classes)


def _encoder(n_layer: int, d_model: int, d_inner: int, seqlen: int) -> int:
    """Forward FLOPs of a token in layers with heads that together are as wide as the model."""
    return n_layer * (2 * (4 * d_model * d_model + 2 * d_model * d_inner) + 4 * d_model * seqlen)


def _measured(model: nn.Module, seqlen: int) -> int | None:
    from torch.distributed.tensor import DTensor
    from torch.utils.flop_counter import FlopCounterMode

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None  # running it would make the processes exchange weights

    def shape_only(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    state: dict[str, Any] = {
        name: shape_only(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            tokens = torch.zeros(1, seqlen, dtype=torch.int64, device="meta")
            torch.func.functional_call(model, state, (tokens,))
    except Exception:  # whatever a model that we do not know cannot do without data
        return None
    return _TRAINING * counter.get_total_flops() or None


# Peak of dense matrix products in TFLOP/s, from the makers' data sheets (which also advertise twice these, for sparse
# matrices): with 16-bit operands, with TF32, and in float32 proper. By a part of the device's name; the first that is
# in it counts.
_PEAKS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500.0, 1250.0, 80.0),
    "B200": (2250.0, 1125.0, 75.0),
    "GH200": (989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A6000": (154.8, 77.4, 38.7),
    "A10G": (70.0, 35.0, 31.2),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "V100": (125.0, 15.7, 15.7),
    "T4": (65.0, 8.1, 8.1),
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak TFLOP/s of a device in a Lightning precision ("bf16-mixed", "32-true", ...), None for devices not known."""
    for name, (half, tf32, single) in _PEAKS.items():
        if name in device_name:
            if precision.startswith(("bf16", "16")):
                return half
            return single if torch.get_float32_matmul_precision() == "highest" else tf32
    return None
