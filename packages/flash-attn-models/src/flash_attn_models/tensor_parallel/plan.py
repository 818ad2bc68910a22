"""How a model is spread over ranks: what makes its layers, so that blocks need not know.

A model of one process is the same code: there the layers are those of torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from flash_attn_ops.activations import Activation, GatedActivation
from flash_attn_ops.distributed import (
    Group,
    GroupLike,
    Partition,
    RngStream,
    all_gather,
    copy_to_ranks,
    gather_shards,
    mark_sequence_parallel,
    resolve_group,
)
from flash_attn_ops.fused_dense import FusedGatedMLP, FusedMLP
from flash_attn_ops.tensor_parallel import column_parallel_linear
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.heads import (
    HeadColumnLinear,
    HeadPartition,
    HeadRowLinear,
    KeyValuePartition,
    QueryPartition,
)
from flash_attn_models.tensor_parallel.layers import ColumnLinear, ParallelMLP, RowLinear, VocabularyEmbedding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Embedding = nn.Embedding | VocabularyEmbedding


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share a model, and what of it is cut.

    Heads, hidden features of MLPs and the vocabulary are cut over the ranks; all ranks hold everything else alike. With
    ``sequence_parallel``, in training mode, tensors between layers are cut too, along their first dimension: positions
    of a decoder (S / W, B, d_model), packed tokens of BERT (T / W, d_model), images of ViT (B / W, S, d_model). In
    evaluation mode all ranks have all of them.

    Attributes:
        group: the ranks; a single process by default.
        sequence_parallel: whether tensors between layers are cut in training.
    """

    group: Group = field(default_factory=Group)
    sequence_parallel: bool = False

    @classmethod
    def of(cls, process_group: GroupLike, sequence_parallel: bool) -> TensorParallel:
        """From the arguments of a model.

        Raises:
            ValueError: no group of ranks; sequence_parallel without one.
        """
        if process_group is None and sequence_parallel:
            raise bad_argument(
                "sequence_parallel",
                True,
                "False without a process_group, among whose ranks the tokens are cut",
                "pass process_group, or leave sequence_parallel out",
            )
        return cls(resolve_group(process_group), sequence_parallel)

    @property
    def is_parallel(self) -> bool:
        return self.group.size > 1

    def cuts_tokens(self, training: bool) -> bool:
        """Whether tensors between layers are cut, in this mode of the model."""
        return self.is_parallel and self.sequence_parallel and training

    # Layers.

    def column(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        blocks: tuple[int, ...] | None = None,
        **factory: Any,
    ) -> nn.Linear | ColumnLinear:
        """A linear layer of which each rank has a part of the outputs; of each of ``blocks``, if given."""
        if not self.is_parallel:
            return nn.Linear(in_features, out_features, bias=bias, **factory)
        self._check_features(out_features if blocks is None else min(blocks))
        return ColumnLinear(
            *(in_features, out_features, self.group),
            bias=bias,
            sequence_parallel=self.sequence_parallel,
            blocks=blocks,
            **factory,
        )

    def row(
        self, in_features: int, out_features: int, *, bias: bool, **factory: Any
    ) -> nn.Linear | RowLinear:
        """A linear layer of which each rank has a part of the inputs."""
        if not self.is_parallel:
            return nn.Linear(in_features, out_features, bias=bias, **factory)
        return RowLinear(
            *(in_features, out_features, self.group),
            bias=bias,
            sequence_parallel=self.sequence_parallel,
            **factory,
        )

    def embedding(
        self, vocab_size: int, width: int, padding_idx: int | None = None, **factory: Any
    ) -> Embedding:
        """An embedding of which each rank has a part of the vocabulary."""
        if not self.is_parallel:
            return nn.Embedding(vocab_size, width, padding_idx, **factory)
        return VocabularyEmbedding(
            *(vocab_size, width, self.group),
            padding_idx=padding_idx,
            sequence_parallel=self.sequence_parallel,
            **factory,
        )

    def vocabulary(self, vocab_size: int) -> Partition:
        """How a vocabulary is cut."""
        return Partition.of(vocab_size, self.group.size)

    def heads(self, n_head: int, n_head_kv: int, d_head: int) -> HeadPartition:
        """How the rows [q | k | v] of these heads are cut."""
        return HeadPartition.of_heads(n_head, n_head_kv, d_head, self.group.size)

    def qkv(
        self, d_model: int, heads: HeadPartition, *, bias: bool, **factory: Any
    ) -> nn.Linear | HeadColumnLinear:
        """The packed projection of queries, keys and values."""
        if not self.is_parallel:
            return nn.Linear(d_model, heads.size, bias=bias, **factory)
        return HeadColumnLinear(
            *(d_model, heads, self.group), bias=bias, sequence_parallel=self.sequence_parallel, **factory
        )

    def queries(
        self, d_model: int, heads: HeadPartition, *, bias: bool, **factory: Any
    ) -> nn.Linear | HeadColumnLinear:
        """The projection of queries alone, where keys and values are of something else."""
        if not self.is_parallel:
            return nn.Linear(d_model, heads.blocks[0], bias=bias, **factory)
        rows = QueryPartition.of_heads(heads, heads.d_head)
        return HeadColumnLinear(
            *(d_model, rows, self.group), bias=bias, sequence_parallel=self.sequence_parallel, **factory
        )

    def keys_values(
        self, d_context: int, heads: HeadPartition, *, bias: bool, **factory: Any
    ) -> nn.Linear | HeadColumnLinear:
        """The packed projection of the keys and values of a context, all of which every rank has."""
        if not self.is_parallel:
            return nn.Linear(d_context, 2 * heads.blocks[1], bias=bias, **factory)
        rows = KeyValuePartition.of_heads(heads)
        return HeadColumnLinear(*(d_context, rows, self.group), bias=bias, sequence_parallel=False, **factory)

    def heads_out(
        self, d_model: int, heads: HeadPartition, *, bias: bool, **factory: Any
    ) -> nn.Linear | HeadRowLinear:
        """The projection of all query heads' results back to the model's width."""
        if not self.is_parallel:
            return nn.Linear(heads.blocks[0], d_model, bias=bias, **factory)
        return HeadRowLinear(
            *(heads, d_model, self.group), bias=bias, sequence_parallel=self.sequence_parallel, **factory
        )

    def mlp(
        self,
        d_model: int,
        d_inner: int,
        activation: str,
        *,
        gated: bool = False,
        bias: bool = True,
        **factory: Any,
    ) -> nn.Module:
        """fc2(activation(fc1(x))); ``gated``: fc2(value * activation(gate)) with [value | gate] = fc1(x)."""
        if not self.is_parallel and gated:
            return FusedGatedMLP(
                d_model, d_inner, bias1=bias, bias2=bias, activation=activation, multiple_of=1, **factory
            )
        if not self.is_parallel:
            return FusedMLP(d_model, d_inner, bias1=bias, bias2=bias, activation=activation, **factory)
        blocks = (d_inner, d_inner) if gated else (d_inner,)
        return ParallelMLP(
            self.column(d_model, sum(blocks), bias=bias, blocks=blocks, **factory),
            self.row(d_inner, d_model, bias=bias, **factory),
            GatedActivation(activation, "value_gate") if gated else Activation(activation),
        )

    def mark(self, *modules: nn.Module | None) -> None:
        """Say that ranks apply these modules, which they hold alike, to their own tokens in training: gradients of
        their parameters are to be added up over the ranks."""
        if self.is_parallel and self.sequence_parallel:
            for module in modules:
                if module is not None:
                    mark_sequence_parallel(module)

    def check_mode(
        self,
        training: bool,
        entries: int | None = None,
        name: str = "",
        *,
        without: dict[str, Any] | None = None,
    ) -> None:
        """Raise ValueError unless a model in this mode may compute this.

        Args:
            entries, name: the size of what is cut over the ranks, and the argument that has it.
            without: arguments that need all tokens on every rank, by name; None where they are not given.
        """
        if not (self.is_parallel and self.sequence_parallel):
            return
        if not training:
            if torch.is_grad_enabled():
                raise bad_argument(
                    "sequence_parallel",
                    "evaluation mode with gradients enabled",
                    "training mode for gradients: these are added up over the ranks as training mode cuts the tokens",
                    "call model.train(), use torch.no_grad(), or build the model without sequence_parallel",
                )
            return
        for argument, value in ({} if without is None else without).items():
            if value is not None:
                raise bad_argument(
                    argument,
                    f"a {type(value).__name__} in training mode with sequence_parallel",
                    "None where ranks share the tokens",
                    "call model.eval() first, or build the model without sequence_parallel",
                )
        if entries is not None and entries % self.group.size:
            raise bad_argument(
                name,
                f"{entries} positions, tokens or images",
                f"a multiple of {self.group.size}, the ranks among which sequence_parallel shares them",
                "pad them to a multiple, or build the model without sequence_parallel",
            )

    # Tensors.

    def on_own_heads(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module that all ranks hold alike, applied to each one's own heads: gradients of its parameters are added up
        over the ranks."""
        if not self.is_parallel or not torch.is_grad_enabled():
            return module(x)
        parameters = {name: copy_to_ranks(p, self.group) for name, p in module.named_parameters()}
        return torch.func.functional_call(module, parameters, (x,))

    def own_part(self, x: Tensor, training: bool) -> Tensor:
        """Of what all ranks have alike and no gradient goes through: this rank's part along dimension 0, where that is
        cut."""
        return x.chunk(self.group.size)[self.group.rank] if self.cuts_tokens(training) else x

    def padded(self, per_token: Tensor, training: bool) -> Tensor:
        """(T,) with zeros behind, so that the ranks can share them evenly, where they do."""
        extra = -per_token.shape[0] % self.group.size if self.cuts_tokens(training) else 0
        return F.pad(per_token, (0, extra)) if extra else per_token

    def enter(self, x: Tensor, training: bool) -> Tensor:
        """x (cut, or alike on all ranks) whole, for products with parts of weights: gradients are added up."""
        return all_gather(x, self.group) if self.cuts_tokens(training) else copy_to_ranks(x, self.group)

    def whole(self, x: Tensor, training: bool, size: int | None = None) -> Tensor:
        """x (cut, or alike on all ranks) whole, for what all ranks do alike; of so many rows, if it was padded."""
        return gather_shards(x, self.group)[:size] if self.cuts_tokens(training) else x

    def vocabulary_product(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, is_cut: bool = False
    ) -> Tensor:
        """Logits of this rank's part of the vocabulary, for all tokens; ``is_cut`` says that hidden is."""
        if not self.is_parallel:
            return F.linear(hidden, weight, bias)
        return column_parallel_linear(hidden, weight, bias, self.group, sequence_parallel=is_cut)

    def whole_vocabulary(self, logits: Tensor, vocabulary: Partition) -> Tensor:
        """Logits of this rank's part of the vocabulary (..., local vocabulary) -> (..., vocabulary)."""
        return gather_shards(logits, self.group, -1, vocabulary.sizes()) if self.is_parallel else logits

    def cross_entropy_options(self, vocabulary: Partition) -> dict[str, Any]:
        """What the cross-entropy of flash_attn_ops must know of logits of this rank's part of the vocabulary."""
        if not self.is_parallel:
            return {}
        start = vocabulary.ranges(self.group.rank)[0].start
        return {"process_group": self.process_group, "vocab_start": start, "vocab_size": vocabulary.size}

    @property
    def process_group(self) -> ProcessGroup:
        """torch's own object; not kept, since models that hold one could not be copied."""
        return dist.distributed_c10d._resolve_process_group(cast(Any, self.group.name))

    # Random numbers.

    # All ranks must be seeded alike, for dropout of what they hold alike. What is cut over the ranks must be dropped
    # independently, or masks repeat. Both streams come from torch's generators, so that seeds hold, and recomputation
    # for activation checkpointing does, which restores these.

    def randomness_of_tokens(self, has_dropout: bool) -> AbstractContextManager[None]:
        """Around all that works on cut tokens: each rank draws random numbers of its own."""
        return self._own_randomness() if has_dropout and self.cuts_tokens(True) else nullcontext()

    def randomness_of_heads(self, has_dropout: bool) -> AbstractContextManager[None]:
        """Around attention with dropout: each rank draws random numbers of its own."""
        # With cut tokens, randomness_of_tokens is around everything already.
        active = has_dropout and self.is_parallel and not self.sequence_parallel
        return self._own_randomness() if active else nullcontext()

    def _own_randomness(self) -> AbstractContextManager[None]:
        seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        return RngStream(seed, self.group, same_on_all_ranks=False).active()

    def _check_features(self, features: int) -> None:
        if features < self.group.size:
            raise bad_argument(
                "process_group",
                f"{self.group.size} ranks for {features} features",
                f"at most {features} ranks",
                "use fewer ranks",
            )


SINGLE_PROCESS = TensorParallel()
