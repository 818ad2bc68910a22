"""Tensor-parallel layers in one process: equal to torch's, options, rejected arguments. On several ranks:
ranks_tensor_parallel.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from flash_attn_ops.distributed import Group
from flash_attn_ops.fused_dense import FusedGatedMLP
from flash_attn_ops.tensor_parallel import (
    ColumnParallelEmbedding,
    ColumnParallelLinear,
    ParallelFusedMLP,
    ParallelGatedMLP,
    ParallelGPT2Embeddings,
    ParallelMLP,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    combine_state_dicts,
    parameter_partitions,
    row_parallel_linear,
    shard_state_dict,
)
from flash_attn_ops.tensor_parallel.products import overlaps_own_rows
from torch import nn

FP64 = torch.float64


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(layer, bias: bool) -> None:
    torch.manual_seed(1)
    expected = nn.Linear(5, 7, bias=bias)
    torch.manual_seed(1)
    actual = layer(5, 7, bias=bias)
    assert actual.state_dict().keys() == expected.state_dict().keys()
    x = torch.randn(2, 3, 5)
    assert torch.equal(actual(x), expected(x))
    before = copy.deepcopy(actual.state_dict())
    torch.manual_seed(1)
    actual.reset_parameters()
    assert all(torch.equal(actual.state_dict()[name], values) for name, values in before.items())
    assert "rank 0 of 1" in repr(actual)
    assert torch.equal(pickle.loads(pickle.dumps(actual))(x), expected(x))


@pytest.mark.parametrize("linear", [column_parallel_linear, row_parallel_linear])
def test_gradcheck(linear) -> None:
    tensors = [torch.randn(*shape, dtype=FP64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(linear, tensors)
    assert torch.autograd.gradcheck(linear, tensors[:2])


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("activation", ["gelu_approx", "gelu", "relu", "sqrelu", "silu"])
def test_fused_mlp_gradcheck(level, activation) -> None:
    mlp = ParallelFusedMLP(3, 4, 2, activation=activation, checkpoint_lvl=level, dtype=FP64)
    parameters = [parameter.detach().requires_grad_() for parameter in mlp.parameters()]
    names = [name for name, _ in mlp.named_parameters()]

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mlp, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        function, (torch.randn(3, 3, dtype=FP64, requires_grad=True), *parameters)
    )


def test_checkpoint_levels_keep_less() -> None:
    """What is saved between forward and backward: the hidden features twice, once, not at all."""
    saved = {}
    for level in (0, 1, 2):
        mlp = ParallelFusedMLP(4, 32, activation="gelu", checkpoint_lvl=level)  # type: ignore[arg-type]
        parameters = {parameter.data_ptr() for parameter in mlp.parameters()}
        kept: dict[int, int] = {}

        def keep(
            tensor: torch.Tensor, kept: dict[int, int] = kept, parameters: set[int] = parameters
        ) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mlp(torch.randn(8, 4, requires_grad=True))
        saved[level] = sum(kept.values())
    assert saved[2] == 8 * 4 and saved[1] == saved[2] + 8 * 32 and saved[0] >= saved[1] + 8 * 32, saved


def test_activations_act() -> None:
    x = torch.randn(4, 6)
    outputs = []
    for activation in ("gelu", "gelu_tanh", "relu", "squared_relu", "silu"):
        torch.manual_seed(0)
        outputs.append(ParallelMLP(6, 8, activation=activation)(x))
    for activation in ("silu", "gelu", torch.sigmoid):
        torch.manual_seed(0)
        outputs.append(ParallelGatedMLP(6, 8, activation=activation, multiple_of=1)(x))
    for index, one in enumerate(outputs):
        assert not any(torch.equal(one, other) for other in outputs[:index])
    torch.manual_seed(0)
    glu = ParallelGatedMLP(6, 8, activation=torch.sigmoid, multiple_of=1)
    assert torch.equal(glu(x), glu.fc2(F.glu(glu.fc1(x))))
    with pytest.raises(ValueError, match="activation: got 'swish2'"):
        ParallelMLP(6, 8, activation="swish2")
    with pytest.raises(ValueError, match="activation: got None; expected a name or a function"):
        ParallelMLP(6, 8, activation=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation: got None; expected a name or a function"):
        ParallelGatedMLP(6, 8, activation=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint_lvl: got 3"):
        ParallelFusedMLP(6, 8, checkpoint_lvl=3)  # type: ignore[arg-type]


def test_default_sizes() -> None:
    assert ParallelMLP(6).fc1.weight.shape == (24, 6) and ParallelMLP(6).fc2.weight.shape == (6, 24)
    gated = ParallelGatedMLP(96)
    assert gated.fc1.weight.shape == (2 * 256, 96) and gated.fc2.weight.shape == (96, 256)
    for features in range(1, 9):  # the sizes of the layer of one process, whose checkpoints they share
        alone, parallel = FusedGatedMLP(features, multiple_of=2), ParallelGatedMLP(features, multiple_of=2)
        assert parallel.fc1.weight.shape == alone.fc1.weight.shape
    assert ParallelGatedMLP(96, bias1=False, bias2=False).state_dict().keys() == {"fc1.weight", "fc2.weight"}


def test_a_rank_of_a_group_without_its_process() -> None:
    """Groups are data: layers of any rank can be made, on the meta device too, to cut a checkpoint."""
    whole = ParallelGatedMLP(6, 10, multiple_of=2)
    ranks = [
        ParallelGatedMLP(6, 10, multiple_of=2, group=Group("-", 3, rank), device="meta") for rank in range(3)
    ]
    assert [layer.fc1.weight.shape for layer in ranks] == [(8, 6), (8, 6), (4, 6)]
    shards = [shard_state_dict(ranks[0], whole.state_dict(), rank) for rank in range(3)]
    for layer, shard in zip(ranks, shards, strict=True):
        layer.to_empty(device="cpu").load_state_dict(shard)
    x = torch.randn(5, 6)
    expected = whole.fc1(x)
    for rank, layer in enumerate(ranks):
        own = F.linear(x, layer.fc1.weight, layer.fc1.bias)
        torch.testing.assert_close(own, layer.fc1.partition.shard(expected, rank, -1))
    again = combine_state_dicts(ranks[0], shards)
    assert all(torch.equal(again[name], values) for name, values in whole.state_dict().items())


def test_state_dict_helpers_refuse() -> None:
    layer = nn.Sequential(ColumnParallelLinear(4, 6, Group("-", 2, 0)))
    whole = {"0.weight": torch.zeros(6, 4), "0.bias": torch.zeros(6)}
    assert set(parameter_partitions(layer)) == set(whole)
    with pytest.raises(ValueError, match=r"0\.bias: got shape \(3,\)"):
        shard_state_dict(layer, {**whole, "0.bias": torch.zeros(3)}, 0)
    shards = [shard_state_dict(layer, whole, rank) for rank in range(2)]
    for wrong in ([], [shards[0], {}], [*shards, shards[0]], shards[:1]):
        with pytest.raises(ValueError, match=r"state_dicts: got|shards: got"):
            combine_state_dicts(layer, wrong)


def test_embeddings_are_torchs() -> None:
    indices = torch.randint(0, 11, (2, 5))
    for layer in (VocabParallelEmbedding, ColumnParallelEmbedding):
        torch.manual_seed(1)
        expected = nn.Embedding(11, 6, padding_idx=-2)
        torch.manual_seed(1)
        actual = layer(11, 6, padding_idx=-2)
        assert torch.equal(actual.weight, expected.weight) and (actual.weight[9] == 0).all()
        assert torch.equal(actual(indices).view(2, 5, 6), expected(indices))
    model = ParallelGPT2Embeddings(6, 11, 8)
    out = model(indices)
    assert out.shape == (10, 6)  # sequence-parallel: tokens in one dimension
    words, positions = model.word_embeddings.weight, model.position_embeddings.weight
    assert torch.equal(out.view(2, 5, 6), words[indices] + positions[:5])
    shifted = model(indices, torch.arange(3, 8))
    assert torch.equal(shifted.view(2, 5, 6), words[indices] + positions[3:8])
    assert ParallelGPT2Embeddings(6, 11, 8, sequence_parallel=False)(indices).shape == (2, 5, 6)


@pytest.mark.parametrize("bad", [-1, 11])
def test_indices_out_of_range(bad: int) -> None:
    indices = torch.tensor([[3, bad]])
    for layer in (VocabParallelEmbedding(11, 6), ColumnParallelEmbedding(11, 6)):
        with pytest.raises(ValueError, match=r"indices: got values from .*0 to 10"):
            layer(indices)
    with pytest.raises(ValueError, match="indices: got values"):
        ParallelGPT2Embeddings(6, 11, 8)(indices)
    with pytest.raises(ValueError, match="indices: got values from 0 to 8"):
        ParallelGPT2Embeddings(6, 11, 8)(torch.zeros(1, 9, dtype=torch.int64))
    # Where the values are not looked at, the embedding of such an index is NaN, and only that.
    compiled = torch.compile(VocabParallelEmbedding(11, 6), backend="eager", fullgraph=True)
    out = compiled(indices)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_bad_input() -> None:
    x, weight = torch.zeros(4, 3), torch.zeros(2, 3)
    for linear in (column_parallel_linear, row_parallel_linear):
        with pytest.raises(ValueError, match=r"x: got shape \(4, 4\)"):
            linear(torch.zeros(4, 4), weight)
        with pytest.raises(ValueError, match=r"x: got shape \(3,\)"):
            linear(torch.zeros(3), weight)
        with pytest.raises(ValueError, match=r"weight: got shape \(2, 3, 1\)"):
            linear(x, weight[..., None])
        with pytest.raises(ValueError, match=r"bias: got shape \(3,\)"):
            linear(x, weight, torch.zeros(3))
        with pytest.raises(ValueError, match=r"weight: got torch\.float64"):
            linear(x, weight.double())
        with pytest.raises(ValueError, match=r"x: got torch\.int64"):
            linear(x.long(), weight)
        with pytest.raises(ValueError, match="x: got None"):
            linear(None, weight)
        with pytest.raises(ValueError, match="group: got str"):
            linear(x, weight, None, "tp")
    with pytest.raises(ValueError, match="dim: got 10"):
        ColumnParallelLinear(4, 10, multiple_of=4)
    with pytest.raises(ValueError, match="num_embeddings: got 3"):
        VocabParallelEmbedding(3, 6, Group("-", 4, 0))
    with pytest.raises(ValueError, match="embedding_dim: got 3"):
        ColumnParallelEmbedding(6, 3, Group("-", 4, 0))
    with pytest.raises(ValueError, match="padding_idx: got 6"):
        VocabParallelEmbedding(6, 3, padding_idx=6)
    with pytest.raises(ValueError, match=r"indices: got torch\.float32"):
        VocabParallelEmbedding(6, 3)(torch.zeros(2))
    with pytest.raises(ValueError, match="position_ids: got"):
        ParallelGPT2Embeddings(6, 11, 0)(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2))


def test_where_products_are_cut_to_overlap() -> None:
    assert overlaps_own_rows(8192, 2) and overlaps_own_rows(2048, 4)
    assert not overlaps_own_rows(2047, 2) and not overlaps_own_rows(8192, 8)


def test_autocast_leaves_float64() -> None:
    layer = ColumnParallelLinear(4, 6, dtype=FP64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(2, 4, dtype=FP64)).dtype == FP64


def test_meta_tensors() -> None:
    for kind in (ParallelMLP, ParallelGatedMLP, ParallelFusedMLP):
        assert kind(4, 6, multiple_of=1, device="meta")(torch.empty(2, 4, device="meta")).shape == (2, 4)


@pytest.mark.parametrize("linear", [column_parallel_linear, row_parallel_linear])
@pytest.mark.parametrize("inputs, outputs", [(0, 4), (4, 0)])
def test_a_rank_without_features(linear, inputs: int, outputs: int) -> None:
    """Of fewer features than ranks, some ranks have none."""
    shapes = ((2, 3, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in shapes)
    out = linear(x, weight, bias)
    out.sum().backward()
    assert torch.equal(out, bias.expand(2, 3, outputs)) and torch.equal(bias.grad, torch.full_like(bias, 6))
    assert torch.equal(x.grad, torch.zeros_like(x)) and weight.grad.shape == weight.shape
