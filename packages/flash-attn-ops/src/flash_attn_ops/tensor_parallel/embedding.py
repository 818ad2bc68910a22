"""Embeddings cut along the vocabulary or along the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument, check_integer
from flash_attn_ops.dispatch import has_memory
from flash_attn_ops.distributed import GroupLike, Partition, all_reduce, reduce_scatter, resolve_group


class _ParallelEmbedding(nn.Module):
    """An embedding of which this rank holds the part that ``partition`` gives it along dimension ``dim``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: GroupLike,
        dim: int,
        multiple_of: int,
        padding_idx: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.group = resolve_group(group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        whole = [num_embeddings, embedding_dim]
        self.dim, self.partition = dim, Partition.of(whole[dim], self.group.size, multiple_of)
        if 0 in self.partition.sizes():
            raise bad_argument(
                ("num_embeddings", "embedding_dim")[dim],
                whole[dim],
                f"at least {multiple_of} for each of {self.group.size} ranks",
                "use fewer ranks, or lower multiple_of",
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise bad_argument(
                "padding_idx",
                padding_idx,
                f"an index of {num_embeddings} embeddings",
                "pass None or a valid one",
            )
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        whole[dim] = self.partition.local_size(self.group.rank)
        self.weight = nn.Parameter(torch.empty(whole, device=device, dtype=dtype))
        self.reset_parameters()

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """How parameters are cut: name, partition, dimension."""
        return {"weight": (self.partition, self.dim)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what ``torch.nn.Embedding`` draws for the whole layer, and keep this rank's part."""
        whole = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self.weight.copy_(self.partition.shard(whole.weight, self.group.rank, self.dim))

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, "
            f"rank {self.group.rank} of {self.group.size}"
        )

    def _check(self, indices: Tensor) -> None:
        """Values are looked at on a CPU only, where that waits for nothing."""
        check_integer("indices", indices, (torch.int64, torch.int32))
        is_read = indices.is_cpu and has_memory(indices) and not torch.compiler.is_compiling()
        if is_read and indices.numel() > 0:
            least, most = (int(value) for value in indices.aminmax())
            if least < 0 or most >= self.num_embeddings:
                raise bad_argument(
                    "indices",
                    f"values from {least} to {most}",
                    f"0 to {self.num_embeddings - 1}",
                    "check the tokenizer and the size of the vocabulary",
                )


class VocabParallelEmbedding(_ParallelEmbedding):
    """``torch.nn.Embedding`` cut along the vocabulary: a rank looks up its own tokens, and the ranks add up.

    Args:
        num_embeddings, embedding_dim: of the whole layer; any vocabulary of at least one entry for each rank.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for a single process.
        sequence_parallel: the result is cut along its tokens.
        padding_idx: the embedding that starts as zero and gets no gradient.
        multiple_of: the ranks' parts of the vocabulary are multiples of it.
        device, dtype: of ``weight`` (local vocabulary, embedding_dim).

    Raises:
        ValueError: a vocabulary too small for the ranks, or not a multiple; a padding_idx outside of it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: GroupLike = None,
        *,
        sequence_parallel: bool = True,
        padding_idx: int | None = None,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, group, 0, multiple_of, padding_idx, device, dtype)
        self.sequence_parallel = sequence_parallel
        self.rows = self.partition.ranges(self.group.rank)[0]

    def forward(self, indices: Tensor) -> Tensor:
        """indices int64 or int32 of any shape (...), the same on all ranks -> (..., embedding_dim), the same on all
        ranks; or, with ``sequence_parallel``, this rank's part of the flattened tokens, (tokens / W, embedding_dim).

        Raises:
            ValueError: indices out of range, on a CPU; elsewhere, where that would wait, their embedding is NaN. Tokens
                that the ranks do not divide, with ``sequence_parallel``.
        """
        return self.reduce(self.partial(indices))

    def partial(self, indices: Tensor) -> Tensor:
        """What this rank adds to the sum: its tokens' embeddings, and zeros for the others."""
        self._check(indices)
        local = indices - self.rows.start
        is_own = (local >= 0) & (local < len(self.rows))
        padding = None
        if self.padding_idx is not None and self.padding_idx in self.rows:
            padding = self.padding_idx - self.rows.start
        own = F.embedding(local.where(is_own, 0), self.weight, padding)
        is_known = (indices >= 0) & (indices < self.num_embeddings)
        other = torch.zeros_like(is_known, dtype=own.dtype).masked_fill(~is_known, float("nan"))
        return torch.where(is_own.unsqueeze(-1), own, other.unsqueeze(-1))

    def reduce(self, partial: Tensor) -> Tensor:
        """Add up what the ranks have, (..., embedding_dim), and cut it along its tokens if asked to."""
        if self.sequence_parallel:
            return reduce_scatter(partial.flatten(0, -2), self.group)
        return all_reduce(partial, self.group)


class ColumnParallelEmbedding(_ParallelEmbedding):
    """``torch.nn.Embedding`` cut along its features.

    Arguments and errors as of :class:`VocabParallelEmbedding`, with features for the vocabulary; there is nothing to
    add up. ``weight`` is (num_embeddings, local features). For the whole result, use
    ``gather_shards(out, group, dim=-1, sizes=layer.partition.sizes())``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: GroupLike = None,
        *,
        padding_idx: int | None = None,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, group, 1, multiple_of, padding_idx, device, dtype)

    def forward(self, indices: Tensor) -> Tensor:
        """indices (...) -> (..., this rank's features).

        Raises:
            ValueError: indices out of range, on a CPU; on a GPU, torch's own assertion fails.
        """
        self._check(indices)
        return F.embedding(indices, self.weight, self.padding_idx)


class ParallelGPT2Embeddings(nn.Module):
    """word_embeddings[ids] + position_embeddings[position], words cut along the vocabulary and positions along the
    features.

    Args:
        embed_dim: features.
        vocab_size: tokens; any number of at least one for each rank.
        max_position_embeddings: positions; 0 or less for none.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for a single process.
        padding_idx: the token whose embedding starts as zero and gets no gradient.
        sequence_parallel: the result is cut along its tokens.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes too small for the ranks.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        group: GroupLike = None,
        *,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            embed_dim,
            group,
            sequence_parallel=sequence_parallel,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
        )
        self.position_embeddings = (
            ColumnParallelEmbedding(max_position_embeddings, embed_dim, group, device=device, dtype=dtype)
            if max_position_embeddings > 0
            else None
        )

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """input_ids (B, S), the same on all ranks -> (B, S, embed_dim), the same on all ranks; or, with
        ``sequence_parallel``, this rank's part of the flattened tokens, (B S / W, embed_dim).

        Args:
            position_ids: (B, S) or (S,); 0 to S - 1 by default.

        Raises:
            ValueError: as :class:`VocabParallelEmbedding`, and position_ids for a model without positions.
        """
        words = self.word_embeddings
        partial = words.partial(input_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
            # Its columns are this rank's addition to the sum, so that one reduction serves both.
            columns = self.position_embeddings.partition.ranges(words.group.rank)[0]
            partial[..., columns.start : columns.stop] += self.position_embeddings(position_ids)
        elif position_ids is not None:
            raise bad_argument(
                "position_ids", "a tensor", "None, as the model has no positions", "leave them out"
            )
        return words.reduce(partial)
