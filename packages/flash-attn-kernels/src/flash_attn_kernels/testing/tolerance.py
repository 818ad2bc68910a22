"""The tolerance law: a result may be at most a small factor further from the truth than plain PyTorch is."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_reference_error(
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    *,
    factor: float = 2.0,
    atol: float = 1e-5,
    name: str = "result",
) -> None:
    """Assert ``max|actual - reference| <= factor * max|plain - reference| + atol``.

    Args:
        actual: what is being tested.
        reference: the truth, in fp64 (or fp32).
        plain: the same computation by plain PyTorch in the dtype of ``actual``; its error sets the scale.
        factor: allowed ratio of errors: 2 for outputs, 2 to 3 for gradients.
        atol: absolute slack for results whose plain error is zero.

    Infinite references (the LSE of empty rows) must be met exactly; NaN never passes.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(reference.shape)}"
    actual64, reference64, plain64 = (x.detach().double() for x in (actual, reference, plain))
    infinite = reference64.isinf()
    assert torch.equal(actual64[infinite], reference64[infinite]), (
        f"{name}: infinities differ from the reference"
    )
    finite = ~infinite
    error = (actual64 - reference64)[finite].abs()
    if error.numel() == 0:
        return
    assert not error.isnan().any(), f"{name}: {int(error.isnan().sum())} NaN values"
    plain_error = (plain64 - reference64)[finite].abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    bound = factor * plain_error + atol
    worst = error.max().item()
    assert worst <= bound, (
        f"{name}: error {worst:.3e} > {factor} * {plain_error:.3e} + {atol:.0e} = {bound:.3e}"
    )
