"""Tensor parallelism in one process: how heads and state dicts are cut, and rejected arguments. On several ranks:
ranks_of_*.py."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.bert import BertForMaskedLM, BertForPreTraining, BertModel
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import FAMILIES, named_config
from flash_attn_models.gpt.model import GPTModel
from flash_attn_models.tensor_parallel import (
    combine_state_dicts,
    gather_state_dict,
    local_parts,
    reduce_gradients,
    shard_state_dict,
)
from flash_attn_models.tensor_parallel.heads import HeadPartition, KeyValuePartition, QueryPartition
from flash_attn_models.tensor_parallel.initial import count_parameters
from flash_attn_models.tensor_parallel.spread import spread_model
from flash_attn_models.vit import ViTForImageClassification, ViTModel
from flash_attn_ops.distributed import Group
from flash_attn_ops.tensor_parallel import parameter_partitions
from torch import Tensor, nn

# Of each family the first size, and those that stand for what the others of their families are not.
DECODERS = [next(iter(family.sizes)) for family in FAMILIES.values()]
DECODERS += ["opt-350m", "falcon-40b", "falcon-rw-1b", "baichuan2-13b", "llama-3.2-1b"]
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


def on_meta(model: type[nn.Module], config: object, ranks: int, rank: int, **options: object) -> nn.Module:
    return model(config, device="meta", process_group=Group("", ranks, rank), **options)


def numbered(model: nn.Module) -> dict[str, Tensor]:
    """A state dict in which no two values of a tensor are the same."""
    return {
        name: torch.arange(values.numel(), dtype=torch.float32).view(values.shape)
        for name, values in model.state_dict().items()
    }


def check_round_trip(model: type[nn.Module], config: object, ranks: int, **options: object) -> None:
    whole = numbered(model(config, device="meta", **options))
    shards = [shard_state_dict(whole, config, rank, ranks) for rank in range(ranks)]
    for rank, shard in enumerate(shards):
        parallel = on_meta(model, config, ranks, rank, **options)
        shapes = {name: values.shape for name, values in parallel.state_dict().items()}
        assert {name: values.shape for name, values in shard.items()} == shapes
        for name, values in whole.items():
            assert torch.equal(local_parts(parallel)(name, values), shard[name])
    again = combine_state_dicts(shards, config)
    assert list(again) == list(whole)
    for name, values in whole.items():
        assert torch.equal(again[name], values), name


@RANKS
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_shard_and_combine(name: str, ranks: int, tiny_decoder) -> None:
    check_round_trip(GPTLMHeadModel, tiny_decoder(name, ranks), ranks)


@RANKS
@pytest.mark.parametrize("n_head_kv", [1, 6])
def test_options_shard_and_combine(n_head_kv: int, ranks: int) -> None:
    sizes = {"vocab_size": 61, "max_seqlen": 48, "n_layer": 1, "n_head": 6, "d_model": 36, "d_inner": 42}
    heads = {"n_head_kv": n_head_kv, "sinks": True, "conv_width": 3, "qk_norm": True}
    head = {"tie_embeddings": False, "head_bias": True}
    config = GPTConfig(**sizes, **heads, **head)
    check_round_trip(GPTLMHeadModel, config, ranks)
    check_round_trip(GPTModel, config, ranks)
    check_round_trip(GPTLMHeadModel, GPTConfig(**sizes, head_bias=True), ranks)


@RANKS
def test_encoders_shard_and_combine(ranks: int, tiny_bert, tiny_vit) -> None:
    check_round_trip(BertForPreTraining, tiny_bert(), ranks)
    check_round_trip(BertForMaskedLM, tiny_bert(), ranks)
    check_round_trip(BertModel, tiny_bert(), ranks)
    check_round_trip(BertModel, tiny_bert(), ranks, with_pooler=False)
    check_round_trip(ViTForImageClassification, tiny_vit(), ranks)
    check_round_trip(ViTModel, tiny_vit(qkv_bias=False), ranks, with_pooler=True)
    check_round_trip(ViTModel, tiny_vit(n_classes=0, class_token=False, pooling="avg"), ranks)


def test_what_is_cut(tiny_decoder) -> None:
    config = tiny_decoder("llama-2-7b", 2)
    whole = numbered(GPTLMHeadModel(config, device="meta"))
    first, second = (shard_state_dict(whole, config, rank, 2) for rank in range(2))
    gated = "transformer.layers.0.mlp.fc1.weight"
    value, gate = whole[gated].chunk(2)
    assert torch.equal(first[gated], torch.cat([value[:21], gate[:21]]))
    qkv = "transformer.layers.1.mixer.Wqkv.weight"
    q, k, v = whole[qkv].split(6 * 8)
    assert torch.equal(second[qkv], torch.cat([q[24:], k[24:], v[24:]]))
    out = "transformer.layers.1.mixer.out_proj.weight"
    assert torch.equal(second[out], whole[out][:, 24:])
    assert torch.equal(first["lm_head.weight"], whole["lm_head.weight"][:31])
    assert torch.equal(second["lm_head.weight"], whole["lm_head.weight"][31:])
    norm = "transformer.layers.1.norm1.weight"
    assert first[norm] is whole[norm]


@pytest.mark.parametrize(
    "n_head, n_head_kv, ranks", [(6, 6, 4), (6, 3, 2), (6, 2, 4), (71, 1, 8), (12, 2, 6)]
)
def test_heads_of_ranks(n_head: int, n_head_kv: int, ranks: int) -> None:
    partition = HeadPartition.of_heads(n_head, n_head_kv, 4, ranks)
    ratio = n_head // n_head_kv
    queries = [head for rank in range(ranks) for head in partition.heads(rank)[0]]
    assert queries == list(range(n_head))
    for rank in range(ranks):
        own, kv = partition.heads(rank)
        assert len(own) % len(kv) == 0  # as attention wants it
        for head in own:
            # The query's head is the one that it has in the rank's order.
            assert head // ratio == kv[(head - own.start) // (len(own) // len(kv))]
        assert partition.local_size(rank) == 4 * (len(own) + 2 * len(kv))
        assert QueryPartition.of_heads(partition, 1).ranges(rank) == [own]
    keys_values = KeyValuePartition.of_heads(partition)
    assert [keys_values.local_size(rank) for rank in range(ranks)] == [
        8 * len(partition.heads(rank)[1]) for rank in range(ranks)
    ]
    for cut in (partition, keys_values):
        whole = torch.arange(cut.size)
        shards = [cut.shard(whole, rank) for rank in range(ranks)]
        assert torch.equal(cut.combine(shards), whole)
        with pytest.raises(ValueError, match="shards: got sizes"):
            cut.combine(shards[:-1])


@pytest.mark.parametrize(
    "name, ranks", [("falcon-7b", 8), ("llama-3-8b", 16), ("gpt2-xl", 8), ("starcoder", 4)]
)
def test_published_sizes_can_be_shared(name: str, ranks: int) -> None:
    config = named_config(name, n_layer=1)
    models = [on_meta(GPTLMHeadModel, config, ranks, rank) for rank in range(ranks)]
    cuts = parameter_partitions(models[0])
    whole = dict(GPTLMHeadModel(config, device="meta").named_parameters())
    for parameter_name, (partition, dim) in cuts.items():
        if parameter_name in whole:
            assert partition.size == whole[parameter_name].shape[dim]
    assert models[0].num_parameters() == sum(parameter.numel() for parameter in whole.values())
    assert models[0].cache_heads == max(1, config.num_heads_kv // ranks) or name == "gpt2-xl"


def test_one_process_is_what_it_was(tiny_decoder) -> None:
    config = tiny_decoder("gpt2", 1)
    model = GPTLMHeadModel(config)
    assert type(model.transformer.layers[0].mixer.Wqkv) is nn.Linear
    assert type(model.transformer.embeddings.word_embeddings) is nn.Embedding
    assert model.cross_entropy_options == {}
    assert model.cache_heads == 6
    gathered = gather_state_dict(model)
    assert gathered is not None and gathered.keys() == model.state_dict().keys()
    before = model.state_dict()["lm_head.weight"] if config.tie_embeddings is False else model.head_weight
    assert local_parts(model)("transformer.embeddings.word_embeddings.weight", before) is before
    reduce_gradients(model)  # has nothing to do


def test_the_same_model_over_ranks(tiny_decoder, tiny_bert, tiny_vit) -> None:
    models = [
        GPTLMHeadModel(tiny_decoder("gpt2", 2), device="meta"),
        *(BertModel(tiny_bert(), with_pooler=pooler, device="meta") for pooler in (False, True)),
        *(BertForMaskedLM(tiny_bert(), with_pooler=pooler, device="meta") for pooler in (False, True)),
        BertForPreTraining(tiny_bert(), device="meta"),
        *(ViTModel(tiny_vit(), with_pooler=pooler, device="meta") for pooler in (False, True)),
        ViTForImageClassification(tiny_vit(), device="meta"),
    ]
    for model in models:
        rank = spread_model(model, Group("", 2, 1), sequence_parallel=True)
        assert type(rank) is type(model) and rank.parallel.group.rank == 1
        assert rank.parallel.sequence_parallel and next(rank.parameters()).is_meta
        assert list(rank.state_dict()) == list(model.state_dict())
        assert count_parameters(rank) == count_parameters(model)
        assert sum(p.numel() for p in rank.parameters()) < count_parameters(model)


def test_one_model_in_evaluation_mode_needs_no_options_for_its_loss(tiny_decoder) -> None:
    model = GPTLMHeadModel(tiny_decoder("gpt2", 2), device="meta", process_group=Group("", 2, 1))
    assert model.eval().cross_entropy_options == {}


def test_bad_arguments(tiny_decoder) -> None:
    config = tiny_decoder("gpt2", 2)
    whole = numbered(GPTLMHeadModel(config, device="meta"))
    with pytest.raises(ValueError, match="rank: got 2; expected a rank of 2"):
        shard_state_dict(whole, config, 2, 2)
    with pytest.raises(ValueError, match=r"state_dict: got an entry 'transformer\.ln_x\.weight'.*ln_f"):
        shard_state_dict({"transformer.ln_x.weight": torch.zeros(36)}, config, 0, 2)
    with pytest.raises(ValueError, match="word_embeddings"):
        name = "transformer.embeddings.word_embeddings.weight"
        shard_state_dict({name: torch.zeros(60, 36)}, config, 0, 2)
    with pytest.raises(ValueError, match="state_dicts: got none"):
        combine_state_dicts([], config)
    with pytest.raises(ValueError, match="different names"):
        combine_state_dicts([whole, {}], config)
    with pytest.raises(ValueError, match="config: got a dict"):
        shard_state_dict(whole, {}, 0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequence_parallel: got True"):
        GPTLMHeadModel(config, sequence_parallel=True)
    with pytest.raises(ValueError, match="group: got str"):
        GPTLMHeadModel(config, process_group="ranks")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="process_group: got 4 ranks for 6 query heads and 3 key/value heads"
    ):
        HeadPartition.of_heads(6, 3, 8, 4)
    for function in (reduce_gradients, gather_state_dict):
        with pytest.raises(ValueError, match="model: got a Linear"):
            function(nn.Linear(2, 2))
