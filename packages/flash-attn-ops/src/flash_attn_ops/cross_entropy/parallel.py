"""Vocab-parallel losses: each process has the logits of some classes, and all of them know every label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn_ops.arguments import bad_argument

from .options import Options, loss_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def place_classes(
    columns: int, vocab_size: int | None, vocab_start: int | None, process_group: ProcessGroup | None
) -> tuple[int, int]:
    """``(class_start, num_classes)`` of a process whose logits have so many columns."""
    if vocab_size is not None and vocab_size < 1:
        raise bad_argument("vocab_size", vocab_size, "a positive number of classes", "leave it out")
    if process_group is None:
        if vocab_start is not None:
            raise bad_argument(
                "vocab_start", vocab_start, "None without process_group", "give the process group"
            )
        if vocab_size is not None and vocab_size > columns:
            expected = f"at most {columns}, the classes of logits"
            raise bad_argument("vocab_size", vocab_size, expected, "leave it out, or give process_group")
        return 0, columns if vocab_size is None else vocab_size
    if torch.compiler.is_compiling():
        fix = "exclude the loss with torch.compiler.disable"
        raise bad_argument("process_group", "a group inside torch.compile", "a group in eager code only", fix)
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    if vocab_start is None:
        return rank * columns, world_size * columns if vocab_size is None else vocab_size
    if vocab_size is None:
        expected = "the number of all classes, with vocab_start"
        raise bad_argument("vocab_size", None, expected, "pass the size of the whole vocabulary")
    if vocab_start < 0:
        raise bad_argument(
            "vocab_start", vocab_start, "no negative class", "pass the first class of this process"
        )
    return vocab_start, vocab_size


def combine(
    maximum: Tensor,
    total: Tensor,
    target: Tensor,
    lse: Tensor | None,
    labels: Tensor,
    options: Options,
    process_group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(losses, maximum, log_total)`` of whole rows from the statistics of each process's columns: two small
    all-reduces, or one if the lse is given."""
    if lse is not None:
        dist.all_reduce(target, group=process_group)
        nothing = torch.zeros_like(lse)
        return loss_of(lse, nothing, target, labels, options), lse, nothing
    largest = maximum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
    shift = torch.where(
        maximum == -torch.inf, 0.0, maximum - largest
    )  # a process may have padding only: total is 0
    sums = torch.stack([total * shift.exp(), target])
    dist.all_reduce(sums, group=process_group)
    log_total, target = sums[0].log(), sums[1]
    return loss_of(largest, log_total, target, labels, options), largest, log_total
