"""The translation units of the kernel templates: one per direction, element type and variant."""

from __future__ import annotations

from collections.abc import Iterator

ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half"}
# (head dim of q and k, of v, general): the variants of csrc/attention/sm80/head_dims.h.
SM80_VARIANTS = (
    (64, 64, False),
    (96, 96, False),
    (128, 128, False),
    (192, 128, False),
    (192, 192, False),
    (256, 256, False),
    (64, 64, True),
    (128, 128, True),
    (256, 256, True),
)
_SIGNATURES = {
    "forward": "template void launch_forward<{element}, {variant}>(ForwardParams, int, cudaStream_t);",
    "backward": "template void launch_backward<{element}, {variant}>(const BackwardParams&, int, cudaStream_t);",
}


def instantiations() -> Iterator[tuple[str, str]]:
    """(file name, source text) of every generated translation unit, those that take longest first."""
    for head_dim, head_dim_v, general in sorted(SM80_VARIANTS, reverse=True):
        variant = f"Variant<{head_dim}, {head_dim_v}, {str(general).lower()}>"
        kind = "general" if general else "plain"
        for direction, signature in _SIGNATURES.items():
            for name, element in ELEMENTS.items():
                yield (
                    f"sm80_{direction}_{name}_d{head_dim}_{head_dim_v}_{kind}.cu",
                    _unit(
                        f"attention/sm80/{direction}_launch.cuh",
                        signature.format(element=element, variant=variant),
                    ),
                )


def _unit(header: str, instantiation: str) -> str:
    return f'#include "{header}"\n\nnamespace flash_attn::sm80 {{\n{instantiation}\n}}\n'
