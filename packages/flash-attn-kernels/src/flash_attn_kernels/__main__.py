"""Self-test, ``python -m flash_attn_kernels``: exit code 0 if attention computes what it should on this machine."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import __version__, explain, flash_attn_func, library
from .inputs import ScoreModifiers
from .options import make_options
from .reference import attention_reference


def main() -> int:
    """Check every path that this machine has against the fp64 definition; print what was found."""
    print(f"flash-attn-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"compiled kernels: {library.load_error() or 'loaded from ' + str(library.LIBRARY_PATH)}")
    cases = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        print(f"device: {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
        cases += [("cuda", torch.float16), ("cuda", torch.bfloat16), ("cuda", torch.float32)]
    else:
        print("device: cpu (torch sees no NVIDIA GPU)")
    results = [_check(device, dtype, name) for device, dtype in cases for name in ("causal", "modifiers")]
    return 0 if all(results) else 1


def _check(device: str, dtype: torch.dtype, name: str) -> bool:
    """Grouped heads, forward and backward, within three times plain PyTorch's error."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 150, 4, 64), (2, 177, 2, 64), (2, 177, 2, 64), (2, 150, 4, 64))
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    arguments: dict[str, Any] = {"causal": True}
    modifiers: dict[str, Any] = {}
    if name == "modifiers":
        arguments = {"window_size": (90, 40), "softcap": 5.0}
        modifiers = {
            "attn_bias": torch.randn(4, 150, 177, generator=generator).to(device),
            "key_padding_mask": (torch.arange(177) < torch.tensor([[177], [120]])).to(device),
            "learnable_sink": torch.randn(4, generator=generator).to(device),
        }
    options = make_options(
        head_dim=64,
        **{
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "dropout_p": 0.0,
            "deterministic": False,
            **arguments,
        },
    )
    four_dimensional = {key: x[None] if x.dim() == 3 else x for key, x in modifiers.items()}

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))]

    def definition(dtype: torch.dtype) -> Callable[..., Tensor]:
        score_modifiers = ScoreModifiers(**four_dimensional)
        return lambda q, k, v: (
            attention_reference(q, k, v, options, modifiers=score_modifiers, compute_dtype=dtype).out
        )

    exact, plain = results(definition(torch.float64), torch.float64), results(definition(dtype), dtype)
    ours = results(lambda q, k, v: flash_attn_func(q, k, v, **arguments, **modifiers), dtype)
    errors = [(a - e).abs().max().item() for a, e in zip(ours, exact, strict=True)]
    allowed = [3 * (p - e).abs().max().item() + 1e-5 for p, e in zip(plain, exact, strict=True)]
    passed = all(error <= bound for error, bound in zip(errors, allowed, strict=True))
    shown = ", ".join(f"{n} {e:.1e}" for n, e in zip(("out", "dq", "dk", "dv"), errors, strict=True))
    path = explain(q, k, v, **arguments, **modifiers).path
    print(f"{'ok  ' if passed else 'FAIL'} {device} {dtype} ({path}), {name}: errors {shown}")
    return passed


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m flash_attn_kernels", description=__doc__).parse_args()
    sys.exit(main())
