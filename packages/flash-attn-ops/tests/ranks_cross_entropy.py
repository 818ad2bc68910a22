"""Vocab-parallel losses, and the head with its loss, on several ranks, against those of one process.

On GPUs in float32, which the kernels take; on CPUs in float64. Run by test_ops_tensor_parallel_launch.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.distributed import Group, resolve_group
from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

CLASSES, ROWS, HIDDEN = 21, 6, 5
LABELS = torch.tensor([0, -100, 20, 7, 11, 5])
SHARDS = pytest.mark.parametrize("shards", ["even", "padded", "uneven", "some of padding only"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "z_loss": 0.1, "reduction": "none", "logit_scale": 0.5},
        {"label_smoothing": 1.0, "reduction": "sum", "ignore_index": 7},
    ],
    ids=str,
)


def columns_of(shards: str, ranks: int) -> tuple[list[slice], int]:
    """Columns of each rank, the last of which may reach into padding, and the number of classes."""
    if shards == "uneven":
        ends = [0, *range(1, 5 * ranks - 4, 5), CLASSES] if ranks > 1 else [0, CLASSES]
        return [slice(*pair) for pair in itertools.pairwise(ends)], CLASSES
    size = CLASSES if shards == "some of padding only" else -(-CLASSES // ranks)
    columns = [slice(rank * size, (rank + 1) * size) for rank in range(ranks)]
    return columns, ranks * size if shards == "even" else CLASSES


def arguments_for(shards: str, group: dist.ProcessGroup) -> tuple[slice, int, int, dict]:
    """This rank's columns, the number of classes and of columns in all, and what the loss is told."""
    columns, classes = columns_of(shards, group.size())
    mine = columns[group.rank()]
    told = {"process_group": group}
    if shards != "even":
        told["vocab_size"] = classes
    if shards == "uneven":
        told["vocab_start"] = mine.start
    return mine, classes, columns[-1].stop, told


def random(*shape: int, device: str) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, dtype=torch.float64).to(device, torch.float32 if device == "cuda" else None)


def labels_for(options: dict, device: str) -> Tensor:
    return (LABELS.clamp(min=0) if "ignore_index" in options else LABELS).to(device)


def check_columns(gradient: Tensor, whole: Tensor, mine: slice) -> None:
    """Padding has gradient 0."""
    own = whole[:, mine]
    padding = gradient.shape[1] - own.shape[1]
    torch.testing.assert_close(gradient, torch.nn.functional.pad(own, (0, padding)))


@SHARDS
@OPTIONS
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_cross_entropy(
    shards: str, options: dict, inplace_backward: bool, with_lse: bool, group: dist.ProcessGroup, device: str
) -> None:
    mine, classes, width, told = arguments_for(shards, group)
    wide, labels = random(ROWS, width, device=device), labels_for(options, device)
    leaf, whole = wide[:, mine].clone().requires_grad_(), wide[:, :classes].clone().requires_grad_()
    lse = (wide[:, :classes] * options.get("logit_scale", 1.0)).logsumexp(-1) if with_lse else None
    how = {"inplace_backward": inplace_backward, "precomputed_lse": lse, "return_z_loss": True}
    loss, z_part = cross_entropy(leaf * 1, labels, **how, **told, **options)
    expected, expected_z = cross_entropy(whole, labels, return_z_loss=True, **options)
    upstream = random(*loss.shape, device=device)
    loss.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z_part, expected_z)
    check_columns(leaf.grad, whole.grad, mine)


@SHARDS
@OPTIONS
def test_linear_cross_entropy(shards: str, options: dict, group: dist.ProcessGroup, device: str) -> None:
    mine, classes, width, told = arguments_for(shards, group)
    labels = labels_for(options, device)
    hidden, weight, bias = (random(*n, device=device) for n in ((ROWS, HIDDEN), (width, HIDDEN), (width,)))
    results = []
    for columns, arguments in ((mine, told), (slice(0, classes), {})):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[columns], bias[columns])]
        loss = linear_cross_entropy(*leaves[:2], labels, leaves[2], chunk_rows=4, **arguments, **options)
        loss.backward(torch.linspace(0.5, 2, loss.numel()).to(loss).view(loss.shape))
        results.append((loss, *(leaf.grad for leaf in leaves)))
    (loss, d_hidden, d_weight, d_bias), expected = results
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(d_hidden, expected[1])
    check_columns(d_weight.t(), expected[2].t(), mine)
    check_columns(d_bias[None], expected[3][None], mine)


def test_groups_in_any_form(group: dist.ProcessGroup, device: str) -> None:
    """As tensor-parallel layers take them."""
    mine, _, width, _ = arguments_for("even", group)
    wide, labels = random(ROWS, width, device=device), LABELS.to(device)
    expected = cross_entropy(wide[:, mine], labels, process_group=group)
    mesh = init_device_mesh(device, (group.size(),))
    for other in (resolve_group(group), mesh):
        assert torch.equal(cross_entropy(wide[:, mine], labels, process_group=other), expected)
        hidden, weight = random(ROWS, HIDDEN, device=device), random(width, HIDDEN, device=device)[mine]
        loss = linear_cross_entropy(hidden, weight, labels, process_group=other)
        assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, process_group=group))
    with pytest.raises(ValueError, match=r"process_group: got Group.*; expected a ProcessGroup"):
        cross_entropy(wide[:, mine], labels, process_group=Group("of nobody", 2, 0))


def test_rejected_arguments(group: dist.ProcessGroup, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random(ROWS, CLASSES, device=device), LABELS.to(device)
    with pytest.raises(ValueError, match=r"vocab_size: got None; expected the number of all classes"):
        cross_entropy(logits, labels, process_group=group, vocab_start=0)
    with pytest.raises(ValueError, match=r"vocab_start: got -1; expected no negative class"):
        cross_entropy(logits, labels, process_group=group, vocab_start=-1, vocab_size=21)
    with pytest.raises(ValueError, match=r"labels: got 20 in row 2"):
        cross_entropy(logits, labels, process_group=group, vocab_size=20, validate=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"process_group: got a group inside torch.compile"):
        cross_entropy(logits, labels, process_group=group)
