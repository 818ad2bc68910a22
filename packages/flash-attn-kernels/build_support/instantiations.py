"""The translation units of the kernel templates: one per path, direction, element type and variant."""

from __future__ import annotations

from collections.abc import Iterator

ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half"}
# (head dim of q and k, of v): those of csrc/attention/head_dims.h.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
SM90_BACKWARD_HEAD_DIMS = ((64, 64), (128, 128))  # those of csrc/attention/sm90/backward_config.h
DECODE_HEAD_DIMS = (64, 128, 256)  # those of csrc/attention/decode/config.h
# Plus whether it is general: the variants of csrc/attention/sm80/head_dims.h.
SM80_VARIANTS = (
    *((*head_dims, False) for head_dims in HEAD_DIMS),
    (64, 64, True),
    (128, 128, True),
    (256, 256, True),
)
_SM80_SIGNATURES = {
    "forward": "template void launch_forward<{element}, {variant}>(ForwardParams, const LaunchTarget&);",
    "backward": "template void launch_backward<{element}, {variant}>(const BackwardParams&, const LaunchTarget&);",
}


def instantiations() -> Iterator[tuple[str, str]]:
    """(file name, source text) of every generated translation unit, those that take longest first."""
    yield from _sm80_units()
    yield from _sm90_forward_units()
    yield from _sm90_backward_units()
    yield from _decode_units()


def _sm80_units() -> Iterator[tuple[str, str]]:
    for head_dim, head_dim_v, general in sorted(SM80_VARIANTS, reverse=True):
        variant = f"Variant<{head_dim}, {head_dim_v}, {str(general).lower()}>"
        kind = "general" if general else "plain"
        for direction, signature in _SM80_SIGNATURES.items():
            for name, element in ELEMENTS.items():
                yield (
                    f"sm80_{direction}_{name}_d{head_dim}_{head_dim_v}_{kind}.cu",
                    _unit("sm80", direction, signature.format(element=element, variant=variant)),
                )


def _sm90_forward_units() -> Iterator[tuple[str, str]]:
    for head_dim, head_dim_v in reversed(HEAD_DIMS):
        for kind, softcap in (("plain", "false"), ("softcap", "true")):
            for name, element in ELEMENTS.items():
                yield (
                    f"sm90_forward_{name}_d{head_dim}_{head_dim_v}_{kind}.cu",
                    _unit(
                        "sm90",
                        "forward",
                        f"template void launch_forward<{element}, HeadDims<{head_dim}, {head_dim_v}>, {softcap}>"
                        "(const ForwardParams&, int*, const LaunchTarget&);",
                    ),
                )


def _sm90_backward_units() -> Iterator[tuple[str, str]]:
    for head_dim, head_dim_v in reversed(SM90_BACKWARD_HEAD_DIMS):
        for name, element in ELEMENTS.items():
            yield (
                f"sm90_backward_{name}_d{head_dim}_{head_dim_v}.cu",
                _unit(
                    "sm90",
                    "backward",
                    f"template void launch_backward<{element}, HeadDims<{head_dim}, {head_dim_v}>>"
                    "(const BackwardParams&, int*, const LaunchTarget&);",
                ),
            )


def _decode_units() -> Iterator[tuple[str, str]]:
    for head_dim in reversed(DECODE_HEAD_DIMS):
        for name, element in ELEMENTS.items():
            yield (
                f"decode_{name}_d{head_dim}.cu",
                _unit(
                    "decode",
                    "decode",
                    f"template void launch_decode<{element}, {head_dim}>"
                    "(const DecodeParams&, int64_t, const LaunchTarget&);",
                ),
            )


def _unit(path: str, direction: str, instantiation: str) -> str:
    header = f"attention/{path}/{direction}_launch.cuh"
    return f'#include "{header}"\n\nnamespace flash_attn::{path} {{\n{instantiation}\n}}\n'
