"""PatchEmbed against the convolution that it replaces."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from flash_attn_ops.patch_embed import PatchEmbed, conv_weight_of_linear, linear_weight_of_conv, patches_of
from torch import nn

FP64 = torch.float64
SIZES = pytest.mark.parametrize(
    "img_size, patch_size", [(8, 4), ((6, 8), (3, 2)), ((4, 10), (4, 5)), ((5, 5), 1)]
)


@SIZES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_is_the_convolution(img_size, patch_size, bias, layout) -> None:
    """Small integers, whose sums are exact in any order: to the bit, gradients too."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    conv = nn.Conv2d(3, 5, patch_size, stride=patch_size, bias=bias, dtype=FP64)
    layer = PatchEmbed(img_size, patch_size, 3, 5, bias=bias, dtype=FP64)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
        layer.proj.weight.copy_(linear_weight_of_conv(conv.weight))
        if bias:
            layer.proj.bias.copy_(conv.bias)
    assert (layer.proj.bias is not None) == bias
    images = torch.randint(-4, 5, (2, 3, height, width)).double()
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        images = images.transpose(2, 3).contiguous().transpose(2, 3)
    one, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected = conv(one)
    out = layer(other)
    assert out.shape == (2, layer.num_patches, 5)
    assert torch.equal(out, expected.flatten(2).transpose(1, 2))
    upstream = torch.randint(-4, 5, expected.shape).double()
    expected.backward(upstream)
    out.backward(upstream.flatten(2).transpose(1, 2))
    assert torch.equal(one.grad, other.grad)
    assert torch.equal(linear_weight_of_conv(conv.weight.grad), layer.proj.weight.grad)


@SIZES
def test_weights_go_back_and_forth(img_size, patch_size) -> None:
    conv = nn.Conv2d(2, 5, patch_size)
    linear = linear_weight_of_conv(conv.weight)
    assert torch.equal(conv_weight_of_linear(linear, patch_size, 2), conv.weight)


def test_options_act() -> None:
    images = torch.randn(2, 3, 8, 12)
    layer = PatchEmbed((8, 12), 4, 3, 6, flatten=False)
    assert layer(images).shape == (2, 2, 3, 6) and layer.grid_size == (2, 3)
    layer.flatten = True
    plain = layer(images)
    assert plain.shape == (2, 6, 6)
    layer.norm = nn.LayerNorm(6)
    normed = PatchEmbed((8, 12), 4, 3, 6, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    assert isinstance(normed.norm, nn.LayerNorm)
    normed.proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(normed(images), normed.norm(plain))
    assert PatchEmbed(8, 4, device="meta").proj.weight.is_meta
    assert PatchEmbed(8, 4, dtype=FP64).proj.weight.dtype == FP64
    assert PatchEmbed().num_patches == 196
    assert layer(images[:0]).shape == (0, 6, 6)


def test_compiled() -> None:
    layer = PatchEmbed((8, 12), 4, 3, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        images = torch.randn(batch, 3, 8, 12)
        assert torch.equal(compiled(images), layer(images))


def test_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PatchEmbed(8, 4, 3, 6)(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16


def test_bad_input() -> None:
    layer = PatchEmbed((8, 12), 4, 3, 6)
    for shape in ((2, 3, 12, 8), (2, 1, 8, 12), (3, 8, 12)):
        with pytest.raises(ValueError, match=r"images: got shape .*\(batch, 3, 8, 12\)"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"img_size: got \(8, 9\)"):
        PatchEmbed((8, 9), 4)
    with pytest.raises(ValueError, match=r"images: got torch.uint8; expected a floating-point dtype"):
        layer(torch.zeros(2, 3, 8, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images: got None"):
        layer(None)
    with pytest.raises(ValueError, match=r"patch_size: got 4\.0"):
        PatchEmbed(8, 4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patch_size: got 0"):
        PatchEmbed(8, 0)
    with pytest.raises(ValueError, match="images: got shape"):
        patches_of(torch.zeros(1, 3, 9, 8), 4)
    with pytest.raises(ValueError, match="weight: got shape"):
        linear_weight_of_conv(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="weight: got shape"):
        conv_weight_of_linear(torch.zeros(2, 3), 4)
