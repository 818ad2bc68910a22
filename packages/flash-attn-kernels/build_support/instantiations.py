"""The translation units of the kernel templates: one per kernel, element type and head dim."""

from __future__ import annotations

from collections.abc import Iterator

ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half"}
SM80_HEAD_DIMS = (64, 128)


def instantiations() -> Iterator[tuple[str, str]]:
    """(file name, source text) of every generated translation unit."""
    for head_dim in SM80_HEAD_DIMS:
        for name, element in ELEMENTS.items():
            yield (
                f"sm80_forward_{name}_d{head_dim}.cu",
                _unit(
                    "attention/sm80/forward_launch.cuh",
                    f"template void launch_forward<{element}, {head_dim}>(const ForwardParams&, cudaStream_t);",
                ),
            )
            yield (
                f"sm80_backward_{name}_d{head_dim}.cu",
                _unit(
                    "attention/sm80/backward_launch.cuh",
                    f"template void launch_backward<{element}, {head_dim}>(const BackwardParams&, int, cudaStream_t);",
                ),
            )


def _unit(header: str, instantiation: str) -> str:
    return f'#include "{header}"\n\nnamespace flash_attn::sm80 {{\n{instantiation}\n}}\n'
