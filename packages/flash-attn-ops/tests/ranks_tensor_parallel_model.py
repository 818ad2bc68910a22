"""Parallel embeddings on several ranks, initial weights, state dicts, and a model, against one process.

Embeddings are of small integers in float64, whose sums are exact in any order: results are compared to the bit.

Run by test_ops_tensor_parallel_launch.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flash_attn_ops.distributed import (
    GroupLike,
    allreduce_sequence_parallel_grad,
    gather_shards,
    mark_sequence_parallel,
    resolve_group,
)
from flash_attn_ops.tensor_parallel import (
    ColumnParallelEmbedding,
    ColumnParallelLinear,
    ParallelFusedMLP,
    ParallelGatedMLP,
    ParallelGPT2Embeddings,
    RowParallelLinear,
    VocabParallelEmbedding,
    combine_state_dicts,
    shard_state_dict,
)
from torch import Tensor, nn

FP64 = torch.float64
SEQUENCE_PARALLEL = pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"]
)


def own_tokens(group: GroupLike, sequence_parallel: bool) -> Callable[[Tensor], Tensor]:
    """This rank's part of (batch, seqlen, features)."""
    me = resolve_group(group)
    return lambda out: out.flatten(0, 1).chunk(me.size)[me.rank] if sequence_parallel else out


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("padding_idx", [None, 0, 9, -1])
@pytest.mark.parametrize("vocabulary", [12, 13])
def test_vocab_parallel(
    vocabulary, padding_idx, sequence_parallel, group, device, check_against_whole
) -> None:
    me = resolve_group(group)
    common = {"padding_idx": padding_idx, "device": device, "dtype": FP64}
    layer = VocabParallelEmbedding(vocabulary, 6, group, sequence_parallel=sequence_parallel, **common)
    indices = torch.randint(0, vocabulary, (me.size, 6), device=device)
    indices[0, :3] = torch.tensor([0, 9, vocabulary - 1])
    whole = nn.Embedding(vocabulary, 6, **common)
    check_against_whole(whole, layer, indices, own_tokens(group, sequence_parallel))
    assert layer(indices[:0]).shape == ((0, 6) if sequence_parallel else (0, 6, 6))
    assert torch.equal(layer(indices.int()), layer(indices))
    if me.size > 1 and sequence_parallel:
        with pytest.raises(ValueError, match="pad them to a multiple"):
            layer(indices.flatten()[: me.size + 1])


def test_column_parallel_embedding(group, device, check_against_whole) -> None:
    me = resolve_group(group)
    common = {"padding_idx": 2, "device": device, "dtype": FP64}
    layer, whole = ColumnParallelEmbedding(7, 9, group, **common), nn.Embedding(7, 9, **common)
    indices = torch.randint(0, 7, (2, 6), device=device)
    check_against_whole(whole, layer, indices, lambda out: layer.partition.shard(out, me.rank, -1))
    assert torch.equal(gather_shards(layer(indices), group, -1, layer.partition.sizes()), whole(indices))


@SEQUENCE_PARALLEL
@pytest.mark.parametrize("positions", ["default", "given", "none"])
def test_gpt2_embeddings(positions, sequence_parallel, group, device, check_against_whole) -> None:
    me = resolve_group(group)
    ids = torch.randint(0, 13, (me.size, 5), device=device)
    position_ids = torch.randint(0, 8, (me.size, 5), device=device) if positions == "given" else None

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = nn.Embedding(13, 6, device=device, dtype=FP64)
            if positions != "none":
                self.position_embeddings = nn.Embedding(8, 6, device=device, dtype=FP64)

        def forward(self, ids: Tensor) -> Tensor:
            words = self.word_embeddings(ids)
            if positions == "none":
                return words
            where = torch.arange(5, device=device) if position_ids is None else position_ids
            return words + self.position_embeddings(where)

    class AtPositions(ParallelGPT2Embeddings):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids, position_ids)

    options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": FP64}
    layer = AtPositions(6, 13, 0 if positions == "none" else 8, group, **options)
    check_against_whole(Whole(), layer, ids, own_tokens(group, sequence_parallel))


def test_initial_weights_are_parts_of_the_whole(group, device) -> None:
    me = resolve_group(group)
    of_blocks = {"blocks": (12, 8), "multiple_of": 2}
    cases: list[tuple[type[nn.Module], tuple[int, int], dict, type[nn.Module], dict]] = [
        (ColumnParallelLinear, (6, 11), {}, nn.Linear, {}),
        (ColumnParallelLinear, (6, 20), of_blocks, nn.Linear, {}),
        (RowParallelLinear, (11, 6), {}, nn.Linear, {}),
        (VocabParallelEmbedding, (11, 6), {"padding_idx": 7}, nn.Embedding, {"padding_idx": 7}),
        (ColumnParallelEmbedding, (6, 11), {}, nn.Embedding, {}),
    ]
    for parallel, sizes, options, single, single_options in cases:
        torch.manual_seed(1)
        layer, next_draw = parallel(*sizes, group, device=device, **options), torch.rand(3, device=device)
        torch.manual_seed(1)
        whole, expected_draw = single(*sizes, device=device, **single_options), torch.rand(3, device=device)
        expected = shard_state_dict(layer, whole.state_dict(), me.rank)
        for name, values in layer.state_dict().items():
            assert torch.equal(values, expected[name]), (layer, name)
        assert torch.equal(next_draw, expected_draw)


def test_state_dicts_of_ranks_and_of_one_process(group, device) -> None:
    me = resolve_group(group)

    def build(group: GroupLike) -> nn.Module:
        model = nn.ModuleDict(
            {
                "embeddings": ParallelGPT2Embeddings(6, 13, 8, group, device=device),
                "norm": nn.LayerNorm(6, device=device),
                "mlp": ParallelGatedMLP(6, 10, group=group, multiple_of=2, device=device),
                "head": ColumnParallelLinear(6, 13, group, device=device),
            }
        )
        model["head"].weight = model["embeddings"].word_embeddings.weight  # tied
        return model

    model, whole = build(group), build(None).state_dict()
    whole = {name: torch.randn_like(values) for name, values in whole.items()}
    shards = [shard_state_dict(model, whole, rank) for rank in range(me.size)]
    model.load_state_dict(shards[me.rank])
    assert model.state_dict().keys() == whole.keys()
    again = combine_state_dicts(model, shards)
    assert again.keys() == whole.keys()
    for name, values in whole.items():
        assert torch.equal(again[name], values), name
    # A gated layer's bias is cut and put together in halves, as its weight; a head's bias as the vocabulary.
    fc1 = model["mlp"].fc1
    value, gate = (half.split(fc1.partition.parts(0)[0] if me.size == 1 else 1) for half in fc1.bias.chunk(2))
    assert torch.equal(torch.cat([*value, *gate]), shards[me.rank]["mlp.fc1.bias"])
    start = sum(model["head"].partition.sizes()[: me.rank])
    size = model["head"].partition.sizes()[me.rank]
    assert torch.equal(model["head"].bias, whole["head.bias"][start : start + size])


class Model(nn.Module):
    """A small language model of one process, or of ranks."""

    def __init__(self, group: GroupLike, sequence_parallel: bool, **options) -> None:
        super().__init__()
        self.group = group
        parallel = {"group": group, "sequence_parallel": sequence_parallel, **options}
        self.embeddings = ParallelGPT2Embeddings(8, 13, 6, **parallel)
        self.norm = nn.LayerNorm(8, **options)
        self.mlp = ParallelGatedMLP(8, 12, multiple_of=2, **parallel)
        self.head = ColumnParallelLinear(8, 13, bias=False, **parallel)
        if sequence_parallel:
            mark_sequence_parallel(self.norm)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embeddings(ids)
        hidden = hidden + self.mlp(self.norm(hidden))
        logits = gather_shards(self.head(hidden), self.group, -1, self.head.partition.sizes())
        return F.cross_entropy(logits.reshape(-1, 13), ids.roll(-1, 1).reshape(-1))


@SEQUENCE_PARALLEL
def test_a_model(sequence_parallel, group, device) -> None:
    me = resolve_group(group)
    torch.manual_seed(3)
    whole = Model(None, False, device=device, dtype=FP64)
    torch.manual_seed(3)
    model = Model(group, sequence_parallel, device=device, dtype=FP64)
    ids = torch.randint(0, 13, (4, 6), device=device)
    expected_loss = whole(ids)
    expected_loss.backward()
    expected = shard_state_dict(model, {name: p.grad for name, p in whole.named_parameters()}, me.rank)
    # Some hundred operations on values of order 1, in another order.
    bound = {"rtol": 0.0, "atol": 256 * torch.finfo(FP64).eps}
    first: dict[str, Tensor] = {}
    for _ in range(2):
        model.zero_grad()
        loss = model(ids)
        loss.backward()
        allreduce_sequence_parallel_grad(model, group)
        torch.testing.assert_close(loss, expected_loss, **bound)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name
            torch.testing.assert_close(parameter.grad, expected[name], **bound)
            bits = first.setdefault(name, parameter.grad)
            assert torch.equal(parameter.grad, bits), f"{name}: other bits the second time"


@SEQUENCE_PARALLEL
def test_compiled(sequence_parallel, group, device) -> None:
    me = resolve_group(group)
    options = {"group": group, "sequence_parallel": sequence_parallel, "device": device, "dtype": FP64}
    embeddings = VocabParallelEmbedding(13, 6, **options)
    mlp = ParallelFusedMLP(6, 10, activation="relu", checkpoint_lvl=2, **options)
    parameters = [parameter for layer in (embeddings, mlp) for parameter in layer.parameters()]

    def function(ids: Tensor) -> Tensor:
        return mlp(embeddings(ids)).square().sum()

    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"  # which on a CPU would call a C++ compiler
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        ids = torch.randint(0, 13, (batch * me.size, 4), device=device)
        expected, actual = function(ids), compiled(ids)
        # The same operations, of which matrix products may be grouped in another way.
        torch.testing.assert_close(actual, expected, rtol=256 * torch.finfo(FP64).eps, atol=0)
        gradients = torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)
        for one, other in zip(*gradients, strict=True):
            bound = 256 * torch.finfo(FP64).eps * other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=bound)
