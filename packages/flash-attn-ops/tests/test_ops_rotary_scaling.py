"""Scalings of rotary frequencies against transformers' own, and XPos."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flash_attn_ops.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    ProportionalScaling,
    RotaryEmbedding,
    YarnScaling,
    from_hugging_face,
)
from torch import Tensor

HEAD_DIM, BASE = 64, 500000.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.0 + i for i in range(32)],
    "original_max_position_embeddings": 4096,
}
HUGGING_FACE: list[tuple[dict[str, Any], int]] = [  # and max_position_embeddings
    ({"rope_type": "default"}, 4096),
    ({"rope_type": "linear", "factor": 3.0}, 4096),
    ({"rope_type": "dynamic", "factor": 3.0}, 4096),
    (YARN, 16384),
    ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, 16384),
    ({**YARN, "attention_factor": 1.3}, 16384),
    ({**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}, 16384),
    ({**YARN, "factor": 0.5}, 16384),
    (LLAMA3, 131072),
    ({**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0}, 131072),
    (LONGROPE, 131072),
    ({**LONGROPE, "attention_factor": 1.1}, 131072),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0}, 4096),
]


def of_transformers(
    parameters: dict[str, Any], max_positions: int, seqlen: int | None
) -> tuple[Tensor, float]:
    utilities = pytest.importorskip("transformers.modeling_rope_utils", reason="compares with transformers")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": BASE, **parameters},
    )
    kind = parameters["rope_type"]
    if kind == "default":
        return BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), 1.0
    return utilities.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seqlen)


@pytest.mark.parametrize(("parameters", "max_positions"), HUGGING_FACE, ids=str)
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], max_positions: int) -> None:
    expected, factor = of_transformers(parameters, max_positions, seqlen=max_positions)
    scaling = from_hugging_face(parameters, max_positions=max_positions)
    module = RotaryEmbedding(HEAD_DIM, BASE, scaling=scaling)
    cos, sin = module.tables(2, torch.device("cpu"))
    torch.testing.assert_close(cos[0], torch.full((32,), float(factor)))
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), expected, rtol=1e-5, atol=1e-9)


def test_every_type_of_transformers_is_known() -> None:
    utilities = pytest.importorskip("transformers.modeling_rope_utils", reason="compares with transformers")
    assert set(utilities.ROPE_INIT_FUNCTIONS) <= {parameters["rope_type"] for parameters, _ in HUGGING_FACE}


def test_dynamic_ntk_is_fixed_for_the_longest_input() -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024}
    expected, _ = of_transformers({"rope_type": "dynamic", "factor": 2.0}, 1024, seqlen=5000)
    scaling = from_hugging_face(parameters, max_positions=5000)
    assert isinstance(scaling, NTKScaling)
    torch.testing.assert_close(scaling.frequencies(HEAD_DIM, BASE).float(), expected, rtol=1e-5, atol=0)
    assert from_hugging_face(parameters, max_positions=10) == NTKScaling(1.0)


def test_short_inputs_of_longrope_take_the_short_factors() -> None:
    scaling = from_hugging_face({**LONGROPE, "factor": 2.0}, max_positions=4096)
    assert isinstance(scaling, LongRopeScaling) and scaling.factors == tuple(LONGROPE["short_factor"])
    expected, factor = of_transformers({**LONGROPE, "factor": 2.0}, 4096, seqlen=None)
    torch.testing.assert_close(scaling.frequencies(HEAD_DIM, BASE).float(), expected, rtol=1e-5, atol=0)
    assert scaling.attention_factor == pytest.approx(factor)


def test_no_scaling_and_the_former_name_of_the_type() -> None:
    assert from_hugging_face(None) is None and from_hugging_face({"rope_type": "default"}) is None
    assert from_hugging_face({"type": "linear", "factor": 2.0}) == LinearScaling(2.0)


def test_missing_factor_is_the_ratio_of_lengths() -> None:
    parameters = {**YARN, "factor": None}
    scaling = from_hugging_face(parameters, max_positions=40960)
    assert isinstance(scaling, YarnScaling) and scaling.factor == 10.0


SCALINGS = [
    LinearScaling(2.0),
    NTKScaling(2.0),
    YarnScaling(4.0, 2048),
    Llama3Scaling(8.0, 1.0, 4.0, 1024),
    LongRopeScaling((2.0,) * 8),
    ProportionalScaling(0.5),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_scaling_acts_and_growing_changes_no_value(scaling: Any) -> None:
    module = RotaryEmbedding(16, scaling=scaling)
    before = [table.clone() for table in module.tables(50, torch.device("cpu"))]
    plain = RotaryEmbedding(16).tables(50, torch.device("cpu"))
    assert not torch.equal(before[1], plain[1]) and repr(scaling) in repr(module)
    module.tables(5000, torch.device("cpu"))
    for old, new in zip(before, module.tables(1, torch.device("cpu")), strict=True):
        assert torch.equal(old, new[:50])


def test_two_dimensions_have_no_base_to_scale() -> None:
    assert torch.equal(NTKScaling(3.0).frequencies(2, 100.0), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("center", [0, 40])
@pytest.mark.parametrize("interleaved", [False, True])
def test_xpos_scores_decay_with_the_distance(interleaved: bool, center: int) -> None:
    """q at m and k at n, rotated: the sum over pairs of decay^((m - n) / scale_base) cos(angle) for equal vectors."""
    rotary = RotaryEmbedding(8, interleaved=interleaved, scale_base=16.0, scale_center=center)
    ones = torch.ones(1, 60, 1, 8, dtype=torch.float64)
    q, k = rotary(ones, ones)
    pair = torch.arange(0, 8, 2, dtype=torch.float64)
    decay, frequency = (pair + 0.4 * 8) / (1.4 * 8), 10000.0 ** (-pair / 8)
    for m, n in ((0, 0), (50, 10), (59, 58)):
        expected = (2 * decay ** ((m - n) / 16) * torch.cos((m - n) * frequency)).sum()
        torch.testing.assert_close((q[0, m, 0] * k[0, n, 0]).sum(), expected, rtol=1e-4, atol=1e-5)


def test_xpos_decodes_as_it_prefills() -> None:
    """Values do not depend on how long the table is: token by token equals one pass, bit for bit."""
    options = {"scale_base": 512.0, "scale_center": 5}
    x = torch.randn(1, 9, 2, 16)
    whole = RotaryEmbedding(16, **options)(x, x)
    decoding = RotaryEmbedding(16, **options)
    steps = [decoding(x[:, i : i + 1], x[:, i : i + 1], i) for i in range(9)]
    for which in (0, 1):
        assert torch.equal(torch.cat([step[which] for step in steps], dim=1), whole[which])
    assert not torch.equal(whole[0], whole[1])
    other = RotaryEmbedding(16, scale_base=512.0)(x, x)
    assert not torch.equal(other[0], whole[0])
    packed = torch.stack([x, x, x], dim=2)
    rotated = RotaryEmbedding(16, **options).rotate_packed(packed)
    assert torch.equal(rotated, torch.stack([*whole, x], dim=2)) and torch.equal(packed[:, :, 0], x)


def test_xpos_gradient() -> None:
    """Scaled rotations have scaled transposes."""
    rotary = RotaryEmbedding(4, scale_base=4.0)
    q, k = torch.randn(2, 1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k), (q, k))


def test_xpos_has_tables_of_its_own_for_keys() -> None:
    rotary, plain = RotaryEmbedding(8, scale_base=8.0), RotaryEmbedding(8)
    device = torch.device("cpu")
    assert not torch.equal(rotary.tables(4, device)[0], rotary.key_tables(4, device)[0])
    assert plain.tables(4, device)[0] is plain.key_tables(4, device)[0]
    product = rotary.tables(4, device)[0] * rotary.key_tables(4, device)[0]
    torch.testing.assert_close(product, plain.tables(4, device)[0].square())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.0), r"factor: got 0.0; expected a positive number"),
        (lambda: NTKScaling(math.inf), r"factor: got inf"),
        (lambda: YarnScaling(2.0, 0), r"original_max_positions: got 0"),
        (lambda: Llama3Scaling(8.0, 4.0, 1.0, 8192), r"high_freq_factor: got 1.0; expected a number above"),
        (lambda: LongRopeScaling((1.0, -1.0)), r"factors: got -1.0"),
        (
            lambda: RotaryEmbedding(8, scaling=LongRopeScaling((1.0,))),
            r"factors: got 1 values; expected 4, one for each pair",
        ),
        (lambda: ProportionalScaling(0.0), r"share: got 0.0"),
        (lambda: RotaryEmbedding(8, scale_base=0.0), r"scale_base: got 0.0"),
        (lambda: from_hugging_face({"rope_type": "su"}), r"rope_type: got 'su'; expected 'default' or 'linear'"),
        (lambda: from_hugging_face({"rope_type": "linear"}), r"factor: got None; expected a value, which linear"),
        (lambda: from_hugging_face({**YARN, "factor": None}), r"factor: got None; expected a value, which yarn"),
        (
            lambda: from_hugging_face({"rope_type": "dynamic", "factor": 2.0}),
            r"original_max_position_embeddings: got None",
        ),
    ],
)  # fmt: skip
def test_rejected_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "Fix: " in str(error.value)
