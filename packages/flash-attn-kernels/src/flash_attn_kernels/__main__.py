"""Self-test, ``python -m flash_attn_kernels``: exit code 0 if attention computes what it should on this machine."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import torch

from . import __version__, explain, flash_attn_func, library
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
    results = [_check(device, dtype) for device, dtype in cases]
    return 0 if all(results) else 1


def _check(device: str, dtype: torch.dtype) -> bool:
    """Causal attention with grouped heads, forward and backward, within three times plain PyTorch's error."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 150, 4, 64), (2, 177, 2, 64), (2, 177, 2, 64), (2, 150, 4, 64))
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    options = make_options(
        head_dim=64,
        softmax_scale=None,
        causal=True,
        window_size=(-1, -1),
        softcap=0.0,
        dropout_p=0.0,
        deterministic=False,
    )

    def results(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))]

    def definition(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: attention_reference(q, k, v, options, compute_dtype=dtype).out

    exact, plain = results(definition(torch.float64), torch.float64), results(definition(dtype), dtype)
    ours = results(lambda q, k, v: flash_attn_func(q, k, v, causal=True), dtype)
    errors = [(a - e).abs().max().item() for a, e in zip(ours, exact, strict=True)]
    allowed = [3 * (p - e).abs().max().item() + 1e-5 for p, e in zip(plain, exact, strict=True)]
    passed = all(error <= bound for error, bound in zip(errors, allowed, strict=True))
    shown = ", ".join(f"{n} {e:.1e}" for n, e in zip(("out", "dq", "dk", "dv"), errors, strict=True))
    print(
        f"{'ok  ' if passed else 'FAIL'} {device} {dtype} ({explain(q, k, v, causal=True).path}): errors {shown}"
    )
    return passed


if __name__ == "__main__":
    sys.exit(main())
