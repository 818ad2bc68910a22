"""The norms as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument, check_number

from .functions import layer_norm, rms_norm


class NormModule(nn.Module):
    """What the modules share: a weight, perhaps a bias, eps, dropout."""

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(hidden_size, int) or hidden_size < 0:
            raise bad_argument(
                "hidden_size", hidden_size, "one size >= 0", "pass the last dimension of the input"
            )
        check_number(eps=eps, dropout_p=dropout_p)
        if not 0.0 <= dropout_p < 1.0:
            raise bad_argument(
                "dropout_p", dropout_p, "a probability in [0, 1)", "pass 0.0 to switch dropout off"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        self.dropout_p = dropout_p
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        shift = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", shift)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        words = [f"{self.hidden_size}, eps={self.eps}, bias={self.bias is not None}"]
        if self.dropout_p > 0:
            words.append(f"dropout_p={self.dropout_p}")
        if self.zero_centered_weight:
            words.append("zero_centered_weight=True")
        return ", ".join(words)


class LayerNorm(NormModule):
    """:func:`layer_norm` with its weight (ones; zeros if ``zero_centered_weight``) and bias (zeros; ``bias=False``
    leaves it out). ``dropout_p`` acts on x in training mode."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__(
            *(hidden_size, eps, bias, device, dtype),
            dropout_p=dropout_p,
            zero_centered_weight=zero_centered_weight,
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Any, ...]:
        return layer_norm(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            dropout_p=self.dropout_p if self.training else 0.0,
            zero_centered_weight=self.zero_centered_weight,
        )


class RMSNorm(NormModule):
    """:func:`rms_norm` with its weight (ones; zeros if ``zero_centered_weight``). ``dropout_p`` acts on x in training
    mode."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__(
            *(hidden_size, eps, False, device, dtype),
            dropout_p=dropout_p,
            zero_centered_weight=zero_centered_weight,
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Any, ...]:
        return rms_norm(
            x,
            self.weight,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            dropout_p=self.dropout_p if self.training else 0.0,
            zero_centered_weight=self.zero_centered_weight,
        )
