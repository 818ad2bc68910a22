"""A model of one process and a rank's part of the same, with the same weights, and what must be equal in the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flash_attn_models.tensor_parallel import reduce_gradients, shard_state_dict
from flash_attn_models.tensor_parallel.initial import count_parameters
from torch import Tensor, nn

FP64 = torch.float64
SEQUENCE_PARALLEL = pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"]
)


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal but for the order of some hundred sums."""
    bound = 4096 * torch.finfo(FP64).eps * max(1.0, expected.abs().max().item())
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert actual.shape == expected.shape and error <= bound, f"{what}: {error}"


def with_other_weights(model: nn.Module) -> nn.Module:
    """Norms, biases and sinks too, so that wrong parts show."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=FP64).to(parameter), alpha=0.2)
    return model


def pair(
    build: Callable[..., nn.Module],
    config: Any,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    device: Any,
) -> tuple[nn.Module, nn.Module]:
    """The model of one process and this rank's, with the same weights."""
    factory = {"device": device, "dtype": FP64}
    torch.manual_seed(3)
    whole, next_draw = build(config, **factory), torch.rand(3)
    torch.manual_seed(3)
    model = build(config, **factory, process_group=group, sequence_parallel=sequence_parallel)
    assert torch.equal(torch.rand(3), next_draw)
    for name, expected in shard_state_dict(whole.state_dict(), config, group.rank(), group.size()).items():
        assert torch.equal(model.state_dict()[name], expected), f"{name} starts differently"
    with_other_weights(whole)
    model.load_state_dict(shard_state_dict(whole.state_dict(), config, group.rank(), group.size()))
    assert count_parameters(model) == count_parameters(whole)
    return whole.train(), model.train()


def check_gradients(whole: nn.Module, model: nn.Module, config: Any, group: dist.ProcessGroup) -> None:
    """After backward of both."""
    reduce_gradients(model)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    expected = shard_state_dict(gradients, config, group.rank(), group.size())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        close(parameter.grad, expected[name], name)


def draw_ids(vocab_size: int, *shape: int, device: Any) -> Tensor:
    torch.manual_seed(7)
    return torch.randint(1, vocab_size, shape, device=device)


def all_ranks(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return parts
