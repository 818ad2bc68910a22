"""LAMB against the formulas of the paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flash_attn_train.optim import Lamb
from torch import Tensor, nn


def paper(
    x: Tensor, gradients: list[Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> Tensor:
    """Algorithm 2 of arXiv:1904.00962, one tensor as one layer, line by line."""
    beta1, beta2 = betas
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        r = m_hat / (v_hat.sqrt() + eps)
        update = r + decay * x
        x = x - lr * x.norm() / update.norm() * update
    return x


NUMBERS: dict[str, Any] = {"lr": 0.02, "eps": 1e-6}


@pytest.mark.parametrize("shape", [(5, 3), (7,), (2, 3, 4)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_the_paper(shape: tuple[int, ...], decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64, generator=generator)
    gradients = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(6)]
    parameter = nn.Parameter(start.clone())
    optimizer = Lamb([parameter], betas=(0.8, 0.9), weight_decay=decay, adapt_undecayed=True, **NUMBERS)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = paper(start, gradients, betas=(0.8, 0.9), decay=decay, **NUMBERS)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


def test_without_decay_it_is_adam_unless_asked_for() -> None:
    start, gradient = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    lamb, adam = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    lamb.grad, adam.grad = gradient.clone(), gradient.clone()
    Lamb([lamb], weight_decay=0.0, **NUMBERS).step()
    torch.optim.AdamW([adam], weight_decay=0.0, **NUMBERS).step()
    torch.testing.assert_close(lamb, adam, rtol=1e-12, atol=0)


def test_zero_tensors_and_zero_updates_stay_finite() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))]
    parameters[0].grad, parameters[1].grad = torch.ones(3), torch.zeros(3)
    Lamb(parameters, weight_decay=0.0, adapt_undecayed=True, **NUMBERS).step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((3,), -0.02))
    assert torch.equal(parameters[1].detach(), torch.ones(3))


def test_tensors_of_several_dtypes_and_without_gradient() -> None:
    parameters = [
        nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    idle = nn.Parameter(torch.ones(3))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Lamb([*parameters, idle], weight_decay=0.1, **NUMBERS)
    optimizer.step()
    assert all(bool((parameter < 1).all()) for parameter in parameters)
    assert torch.equal(idle.detach(), torch.ones(3)) and idle not in optimizer.state


def test_resumes_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    first = nn.Parameter(torch.randn(6, 5, generator=generator))
    gradients = [torch.randn(6, 5, generator=generator) for _ in range(8)]

    def run(parameter: nn.Parameter, optimizer: Lamb, part: list[Tensor]) -> None:
        for gradient in part:
            parameter.grad = gradient.clone()
            optimizer.step()

    optimizer = Lamb([first], weight_decay=0.1, **NUMBERS)
    run(first, optimizer, gradients[:5])
    second = nn.Parameter(first.detach().clone())
    resumed = Lamb([second], weight_decay=0.5, lr=1.0)  # the state brings the numbers too
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(first, optimizer, gradients[5:])
    run(second, resumed, gradients[5:])
    assert torch.equal(first, second)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"betas: got \(0.9, 1.0\)"):
        Lamb([nn.Parameter(torch.ones(1))], betas=(0.9, 1.0))


def test_norms_of_sharded_parameters_are_those_of_the_whole(tmp_path: Any) -> None:
    """On one rank, through DTensor's own code; several ranks are in the tests of strategies."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        start, gradient = torch.randn(4, 4), torch.randn(4, 4)
        plain = nn.Parameter(start.clone())
        sharded = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
        plain.grad = gradient.clone()
        sharded.grad = distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        for parameter in (plain, sharded):
            optimizer = Lamb([parameter], weight_decay=0.1, **NUMBERS)
            optimizer.step()
        assert type(optimizer.state[sharded]["exp_avg"]).__name__ == "DTensor"
        torch.testing.assert_close(sharded.full_tensor(), plain.detach())  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()
