"""Tensor-parallel linear layers and MLPs on several ranks against the same layer in one process.

Where nothing but sums of products is computed, values are small integers in float64, whose sums are exact in any
order: outputs and gradients are compared to the bit.

Run by test_ops_tensor_parallel_launch.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flash_attn_ops.distributed import Partition, all_gather, gather_shards, resolve_group, take_shard
from flash_attn_ops.tensor_parallel import (
    ColumnParallelLinear,
    ParallelFusedMLP,
    ParallelGatedMLP,
    ParallelMLP,
    RowParallelLinear,
    column_parallel_linear,
    parameter_partitions,
    products,
    row_parallel_linear,
    shard_state_dict,
)
from flash_attn_ops.testing import assert_within_reference_error
from torch import Tensor, nn

BF16, FP64 = torch.bfloat16, torch.float64
SEQUENCE_PARALLEL = pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"]
)


def integers(*shape: int, device: str) -> Tensor:
    return torch.randint(-4, 5, shape, device=device).double()


def own_tokens(group, sequence_parallel: bool) -> Callable[[Tensor], Tensor]:
    me = resolve_group(group)
    return lambda tensor: tensor.chunk(me.size)[me.rank] if sequence_parallel else tensor


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "out_features, options",
    [(8, {}), (11, {}), (28, {"multiple_of": 4}), (40, {"blocks": (24, 8, 8), "multiple_of": (6, 2, 2)})],
    ids=["even", "uneven", "multiples", "blocks"],
)
def test_column_parallel(
    sequence_parallel, bias, out_features, options, group, device, check_against_whole
) -> None:
    me = resolve_group(group)
    common = {"bias": bias, "device": device, "dtype": FP64}
    layer = ColumnParallelLinear(
        6, out_features, group, sequence_parallel=sequence_parallel, **options, **common
    )
    check_against_whole(
        nn.Linear(6, out_features, **common),
        layer,
        integers(2 * me.size, 3, 6, device=device),
        lambda out: layer.partition.shard(out, me.rank, -1),
        cuts_input=sequence_parallel,
    )


class OfWholeInput(RowParallelLinear):
    """The layer after the cut of its input that a column-parallel layer before it would have made."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(take_shard(x, self.group, -1, self.partition.sizes()))


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "in_features, multiple_of", [(8, 1), (11, 1), (28, 4)], ids=["even", "uneven", "multiples"]
)
def test_row_parallel(
    sequence_parallel, bias, in_features, multiple_of, group, device, check_against_whole
) -> None:
    me = resolve_group(group)
    common = {"bias": bias, "device": device, "dtype": FP64}
    options = {"sequence_parallel": sequence_parallel, "multiple_of": multiple_of}
    check_against_whole(
        nn.Linear(in_features, 5, **common),
        OfWholeInput(in_features, 5, group, **options, **common),
        integers(2 * me.size, 3, in_features, device=device),
        own_tokens(group, sequence_parallel),
    )


class MLP(nn.Module):
    """Of one process, or in the parts that ranks have, added up in the dtype of the output as the ranks add."""

    def __init__(
        self, fc1: int, hidden: int, out: int, activation: Callable[[Tensor], Tensor], **options
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, fc1, **options), nn.Linear(hidden, out, **options)
        self.activation = activation
        self.cuts: list[Partition] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.cuts:
            return self.fc2(self.activation(self.fc1(x)))
        outputs, inputs = self.cuts
        total = self.fc2.bias
        for rank in range(outputs.world_size):
            weight, bias = (outputs.shard(p, rank) for p in (self.fc1.weight, self.fc1.bias))
            hidden = self.activation(F.linear(x, weight, bias))
            total = total + F.linear(hidden, inputs.shard(self.fc2.weight, rank, 1))
        return total


def relu_gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.relu(gate)


def silu_gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


MLPS: dict[str, tuple[type[nn.Module], dict, Callable[[Tensor], Tensor]]] = {
    "relu": (ParallelMLP, {"activation": "relu"}, F.relu),
    "squared relu": (ParallelMLP, {"activation": "squared_relu"}, squared_relu),
    "function": (ParallelMLP, {"activation": torch.abs, "bias1": True}, torch.abs),
    "gated": (ParallelGatedMLP, {"activation": "relu", "multiple_of": 2}, relu_gated),
    "gated function": (ParallelGatedMLP, {"activation": F.relu, "multiple_of": 1}, relu_gated),
    "fused 0": (ParallelFusedMLP, {"activation": "sqrelu", "checkpoint_lvl": 0}, squared_relu),
    "fused 1": (ParallelFusedMLP, {"activation": "sqrelu", "checkpoint_lvl": 1}, squared_relu),
    "fused 2": (ParallelFusedMLP, {"activation": "sqrelu", "checkpoint_lvl": 2}, squared_relu),
}


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("hidden", [8, 10])
@pytest.mark.parametrize("kind", MLPS)
def test_mlps(kind, hidden, sequence_parallel, group, device, check_against_whole) -> None:
    me = resolve_group(group)
    parallel, options, activation = MLPS[kind]
    common = {"device": device, "dtype": FP64}
    sizes = {"in_features": 6, "hidden_features": hidden, "out_features": 5}
    check_against_whole(
        MLP(2 * hidden if parallel is ParallelGatedMLP else hidden, hidden, 5, activation, **common),
        parallel(**sizes, group=group, sequence_parallel=sequence_parallel, **options, **common),
        integers(2 * me.size, 3, 6, device=device),
        own_tokens(group, sequence_parallel),
        cuts_input=sequence_parallel,
    )


BF16_MLPS: dict[str, tuple[type[nn.Module], dict, Callable[[Tensor], Tensor]]] = {
    "gelu_tanh": (ParallelMLP, {"activation": "gelu_tanh"}, gelu_tanh),
    "silu gated": (ParallelGatedMLP, {"multiple_of": 8}, silu_gated),
    "fused 1": (ParallelFusedMLP, {"checkpoint_lvl": 1}, gelu_tanh),
    "fused 2": (ParallelFusedMLP, {"checkpoint_lvl": 2}, gelu_tanh),
}


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("kind", BF16_MLPS)
def test_bfloat16_by_the_tolerance_law(kind, sequence_parallel, group, device) -> None:
    """Plain PyTorch adds up the ranks' parts too: rounding each of them is a part of the computation."""
    me = resolve_group(group)
    parallel, options, activation = BF16_MLPS[kind]
    layer = parallel(
        6, 64, group=group, sequence_parallel=sequence_parallel, device=device, dtype=BF16, **options
    )
    cuts = parameter_partitions(layer)
    plain = MLP(128 if parallel is ParallelGatedMLP else 64, 64, 6, activation, device=device, dtype=BF16)
    nn.init.normal_(plain.fc1.weight)
    layer.load_state_dict(shard_state_dict(layer, plain.state_dict(), me.rank))
    exact = copy.deepcopy(plain).double()
    plain.cuts = [cuts["fc1.weight"][0], cuts["fc2.weight"][0]]

    x, upstream = (torch.randn(8 * me.size, 6, device=device, dtype=BF16) for _ in range(2))
    own = own_tokens(group, sequence_parallel)
    results = []
    for module, dtype, part in ((layer, BF16, own), (exact, FP64, None), (plain, BF16, None)):
        leaf = (x if part is None else part(x)).to(dtype).clone().requires_grad_()
        out = module(leaf)
        out.backward((upstream if part is None else part(upstream)).to(dtype))
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"out": out, "dx": leaf.grad, **gradients})
    # The errors of whole tensors are compared, not those of a rank's few values.
    for name, actual in results[0].items():
        if name in cuts:
            partition, dim = cuts[name]
            shards = gather_shards(actual, group, dim, partition.sizes()).split(partition.sizes(), dim)
            results[0][name] = partition.combine(shards, dim)
        elif name in ("out", "dx") and sequence_parallel:
            results[0][name] = all_gather(actual, group)
        factor = 2.0 if name == "out" else 3.0
        assert_within_reference_error(*(result[name] for result in results), factor=factor, name=name)


def test_own_rows_apart(group, device, check_against_whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that are cut to overlap with communication are the products."""
    me = resolve_group(group)
    layer = ParallelMLP(6, 8, 5, activation="relu", group=group, device=device, dtype=FP64)
    rows_of_products = []
    product_into = products._product_into

    def counting(out: Tensor, *rest: Tensor | None) -> None:
        rows_of_products.append(out.shape[0])
        product_into(out, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "OVERLAP_MIN_ROWS", 1)
    monkeypatch.setattr(products, "_product_into", counting)
    check_against_whole(
        MLP(8, 8, 5, F.relu, device=device, dtype=FP64),
        layer,
        integers(2 * me.size, 3, 6, device=device),
        own_tokens(group, True),
        cuts_input=True,
    )
    parts = [6, 6 * me.rank, 6 * (me.size - 1 - me.rank)]
    expected = [rows for rows in parts if rows > 0] if me.size > 1 else []
    assert rows_of_products == 2 * expected  # of fc1 forward and fc2 backward


def test_bias_is_added_once_and_its_gradient_is_the_same_bits(group, device) -> None:
    me = resolve_group(group)
    for sequence_parallel in (False, True):
        layer = RowParallelLinear(4 * me.size, 5, group, sequence_parallel=sequence_parallel, device=device)
        assert "bias" in layer.state_dict()  # on every rank
        with torch.no_grad():
            layer.bias.fill_(3.0)
        out = layer(torch.zeros(2 * me.size, 4, device=device))
        assert torch.equal(out, torch.full_like(out, 3.0))
        torch.manual_seed(me.rank if sequence_parallel else 0)  # each rank's tokens have their own gradient
        out.backward(torch.randn_like(out))
        of_ranks = all_gather(layer.bias.grad[None], group)
        assert (of_ranks == of_ranks[0]).all() and of_ranks.abs().sum() > 0


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@pytest.mark.parametrize("linear", [column_parallel_linear, row_parallel_linear])
def test_only_the_gradients_that_are_asked_for(linear, frozen, group, device) -> None:
    me = resolve_group(group)
    inputs = {
        "x": torch.randn(2 * me.size, 4, device=device, dtype=FP64),
        "weight": torch.randn(3, 4, device=device, dtype=FP64),
        "bias": torch.randn(3, device=device, dtype=FP64),
    }
    leaves = {name: values.clone().requires_grad_() for name, values in inputs.items()}
    expected = torch.autograd.grad(linear(*leaves.values(), group).sum(), list(leaves.values()))
    leaves[frozen].requires_grad_(False)
    asked = [name for name in inputs if name != frozen]
    actual = torch.autograd.grad(linear(*leaves.values(), group).sum(), [leaves[name] for name in asked])
    for name, gradient in zip(asked, actual, strict=True):
        assert torch.equal(gradient, dict(zip(inputs, expected, strict=True))[name]), name


def test_strides_and_empty_inputs(group, device) -> None:
    me = resolve_group(group)
    weight, bias = integers(3, 4, device=device), integers(3, device=device)
    for linear in (column_parallel_linear, row_parallel_linear):
        x = integers(4, 5, 2 * me.size, device=device).permute(2, 1, 0).requires_grad_()
        transposed = weight.t().contiguous().t()
        expected = linear(x.detach().contiguous(), weight, bias, group)
        out = linear(x, transposed, bias, group)
        assert torch.equal(out, expected)
        (gradient,) = torch.autograd.grad(out, x, torch.ones((), device=device).double().expand_as(out))
        assert gradient.shape == x.shape and gradient.abs().sum() > 0
        nothing = linear(x[:0], weight, bias, group)
        assert nothing.shape == (0, 5, 3)
        assert torch.autograd.grad(nothing.sum(), x)[0].abs().sum() == 0


def test_tokens_that_the_ranks_do_not_divide(group, device) -> None:
    me = resolve_group(group)
    x, weight = torch.ones(me.size + 1, 3, device=device), torch.ones(2, 3, device=device)
    if me.size > 1:
        with pytest.raises(ValueError, match=rf"x: got {me.size + 1} tokens.*sequence_parallel=False"):
            row_parallel_linear(x, weight, None, group)
    out = row_parallel_linear(x, weight, None, group, sequence_parallel=False)
    assert torch.equal(out, torch.full_like(out, 3.0 * me.size)) and out.shape == (me.size + 1, 2)


@SEQUENCE_PARALLEL
def test_autocast(sequence_parallel, group, device) -> None:
    me = resolve_group(group)
    for layer in (
        ParallelMLP(6, 8, group=group, sequence_parallel=sequence_parallel, device=device),
        ParallelFusedMLP(
            6, 8, group=group, sequence_parallel=sequence_parallel, checkpoint_lvl=2, device=device
        ),
    ):
        x = torch.randn(2 * me.size, 6, device=device, requires_grad=True)
        with torch.autocast(device, dtype=BF16):
            out = layer(x)
        assert out.dtype == BF16
        out.sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
        assert torch.equal(copy.deepcopy(layer).bfloat16()(x.bfloat16()), out)
