"""Cross-attention spread over several ranks against the same layer in one process: outputs and all gradients.

In float64, where what differs is the order of sums. Run by test_models_tensor_parallel_launch.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from flash_attn_models.layers import CrossAttention
from flash_attn_models.tensor_parallel import gather_state_dict, reduce_gradients
from flash_attn_models.tensor_parallel.plan import TensorParallel
from flash_attn_ops import tensor_parallel as ops
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor
from whole_and_part import (
    FP64,
    SEQUENCE_PARALLEL,
    all_ranks,
    close,
    with_other_weights,
)


def own_rows(x: Tensor, group: dist.ProcessGroup, cut: bool) -> Tensor:
    return x.chunk(group.size())[group.rank()] if cut else x


def cross_attention_pair(
    group: dist.ProcessGroup, sequence_parallel: bool, device: Any, **options: Any
) -> tuple[CrossAttention, CrossAttention]:
    """The layer of one process, and this rank's with the same weights."""
    if options.pop("rotary", False):
        options["rotary"] = RotaryEmbedding(6, device=device)
    options |= {"d_context": 20, "d_head": 6, "device": device, "dtype": FP64}
    whole = CrossAttention(24, 12, **options)
    layer = CrossAttention(24, 12, **options, parallel=TensorParallel.of(group, sequence_parallel))
    with_other_weights(whole)
    layer.load_state_dict(ops.shard_state_dict(layer, whole.state_dict(), group.rank()))
    return whole.train(), layer.train()


CROSS_ATTENTION: dict[str, dict[str, Any]] = {
    "all_heads": {"n_head_kv": 12, "causal": True, "rotary": True},
    "grouped": {"sinks": True, "softcap": 5.0},
    "one_head_kv": {"n_head_kv": 1, "sinks": True, "qkv_bias": False, "rotary": True},
}


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CROSS_ATTENTION)
def test_cross_attention(name, packed, sequence_parallel, group, device) -> None:
    # On two and three ranks some have more heads; on four, two share each.
    options = {"n_head_kv": {4: 2}.get(group.size(), 3), **CROSS_ATTENTION[name]}
    whole, layer = cross_attention_pair(group, sequence_parallel, device, **options)
    torch.manual_seed(7)
    if packed:
        x, context = torch.randn(12, 24), torch.randn(9, 20)
        lengths = {"cu_seqlens": [0, 5, 12], "cu_seqlens_context": [0, 2, 9]}
        where: dict[str, Any] = {
            name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in lengths.items()
        }
        where |= {"max_seqlen": 7, "max_seqlen_context": 7}
    else:
        x, context = torch.randn(12, 2, 24), torch.randn(2, 7, 20)
        where = {"key_padding_mask": torch.arange(7, device=device) < torch.tensor([[7], [4]], device=device)}
    x, context = (t.to(device, FP64).requires_grad_() for t in (x, context))
    # In one process the batch is first; over ranks that share the tokens, positions are.
    swapped = not packed
    expected = whole(x.transpose(0, 1) if swapped else x, context, **where)
    expected = expected.transpose(0, 1) if swapped else expected
    weights = torch.randn(expected.shape, device=device, dtype=FP64)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, context], retain_graph=True)
    (expected * weights).sum().backward()

    own = own_rows(x.detach(), group, sequence_parallel).requires_grad_()
    same = context.detach().requires_grad_()
    swapped = swapped and not sequence_parallel
    out = layer(own.transpose(0, 1) if swapped else own, same, **where)
    out = out.transpose(0, 1) if swapped else out
    close(out, own_rows(expected, group, sequence_parallel), "output")
    (out * own_rows(weights, group, sequence_parallel)).sum().backward()
    close(own.grad, own_rows(wanted[0], group, sequence_parallel), "gradient of x")
    close(same.grad, wanted[1], "gradient of the context")
    reduce_gradients(layer)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, gradient in ops.shard_state_dict(layer, gradients, group.rank()).items():
        close(layer.get_parameter(name).grad, gradient, name)
    gathered = gather_state_dict(layer)
    if group.rank() == 0:
        assert gathered is not None and gathered.keys() == whole.state_dict().keys()
        for name, tensor in whole.state_dict().items():
            assert torch.equal(gathered[name], tensor.cpu()), name
    if "causal" not in options and not packed:  # as in generation
        whole.eval(), layer.eval()
        with torch.no_grad():
            projected, expected = layer.project(context, **where), whole(x.transpose(0, 1), context, **where)
            close(layer(x.transpose(0, 1), projected), expected, "with a projected context")


def test_dropout_of_cross_attention_differs(group, device) -> None:
    _, layer = cross_attention_pair(group, False, device, n_head_kv=12, dropout=0.5)
    with torch.no_grad():
        for parameter in (layer.Wq.weight, layer.Wq.bias, layer.Wkv.weight, layer.Wkv.bias):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) % 7)
        layer.out_proj.weight.copy_(torch.eye(24, layer.out_proj.weight.shape[1]))
    parts: list[Tensor] = []
    layer.out_proj.register_forward_pre_hook(lambda module, args: parts.append(args[0]))
    torch.manual_seed(5)
    x = torch.randn(2, 6, 24, dtype=FP64, device=device)
    layer(x, torch.ones(2, 5, 20, dtype=FP64, device=device))
    if group.size() == 2:  # heads are as many on both
        outs = all_ranks(parts[0], group)
        assert not torch.equal(outs[0], outs[1])
