"""Scalings of rotary frequencies, for contexts longer than those of pretraining.

Without one the pair i of R/2 turns by ``base ** (-2 i / R)`` for every position. Each scaling is a frozen dataclass
with other frequencies (float64, R/2) and an ``attention_factor`` that multiplies cos and sin, so that scores grow by
its square. All are constants of a model: none depends on the length of an input, so that what a cache holds stays
right while a sequence grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flash_attn_ops.arguments import bad_argument


class Scaling(Protocol):
    """What :class:`~flash_attn_ops.rotary.RotaryEmbedding` asks a scaling for."""

    @property
    def attention_factor(self) -> float | None:
        """Multiplies cos and sin; None is 1."""

    def frequencies(self, dim: int, base: float) -> Tensor:
        """Angles of each pair for one position, float64 (dim / 2,) on the CPU."""


def unscaled_frequencies(dim: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise bad_argument(name, value, "a positive number", "see the model's configuration")


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` [position interpolation: Chen et al. 2023, arXiv:2306.15595]."""

    factor: float
    attention_factor = None

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    def frequencies(self, dim: int, base: float) -> Tensor:
        return unscaled_frequencies(dim, base) / self.factor


@dataclass(frozen=True)
class NTKScaling:
    """The base times ``factor ** (R / (R - 2))``: the slowest pair is ``factor`` times slower, the fastest as fast as
    before ["NTK-aware" scaling, described in arXiv:2309.00071, section 3.1].

    "Dynamic" NTK chooses the factor anew for every length of the input, by which keys in a cache come to disagree with
    later ones. :meth:`for_length` is its formula for one length, that of the longest input, used throughout.
    """

    factor: float
    attention_factor = None

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    @classmethod
    def for_length(cls, factor: float, original_max_positions: int, length: int) -> NTKScaling:
        """What dynamic NTK with ``factor`` uses for inputs of ``length``; unscaled up to the original length."""
        stretch = max(length, original_max_positions) / original_max_positions
        return cls(factor * stretch - (factor - 1))

    def frequencies(self, dim: int, base: float) -> Tensor:
        if dim == 2:
            return unscaled_frequencies(dim, base)  # one pair, whose frequency no base changes
        return unscaled_frequencies(dim, base * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YarnScaling:
    """Pairs that turn often within the original length are kept, those that turn seldom are interpolated, with a ramp
    between [YaRN: Peng et al. 2023, arXiv:2309.00071].

    Args:
        factor: ratio of the new length to the original one.
        original_max_positions: length of pretraining.
        beta_fast, beta_slow: turns within the original length from which on a pair is kept, and up to which it is
            fully interpolated.
        given_attention_factor: None takes ``0.1 ln(factor) + 1``.
        mscale, mscale_all_dim: if both are given, the attention factor is the ratio of ``0.1 m ln(factor) + 1`` for
            the two (DeepSeek models).
        truncate: the ramp begins and ends at whole pairs.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    given_attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_positive(
            factor=self.factor,
            original_max_positions=self.original_max_positions,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )

    @property
    def attention_factor(self) -> float:
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        log = math.log(max(self.factor, 1.0))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
        return 0.1 * log + 1

    def frequencies(self, dim: int, base: float) -> Tensor:
        first, last = (self._pair_with_turns(turns, dim, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = last - first if last != first else 1e-3
        pair = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
        interpolated = ((pair - first) / width).clamp(0, 1)
        return unscaled_frequencies(dim, base) * (1 - interpolated + interpolated / self.factor)

    def _pair_with_turns(self, turns: float, dim: int, base: float) -> float:
        """The (fractional) pair that turns so many times within the original length."""
        return dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))


@dataclass(frozen=True)
class Llama3Scaling:
    """Wavelengths beyond ``original_max_positions / low_freq_factor`` are stretched by ``factor``, those below
    ``original_max_positions / high_freq_factor`` are kept, with a ramp between [Llama 3.1, arXiv:2407.21783]."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor = None

    def __post_init__(self) -> None:
        _check_positive(
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            original_max_positions=self.original_max_positions,
        )
        if not self.high_freq_factor > self.low_freq_factor:
            expected = f"a number above low_freq_factor ({self.low_freq_factor})"
            raise bad_argument(
                "high_freq_factor", self.high_freq_factor, expected, "see the model's configuration"
            )

    def frequencies(self, dim: int, base: float) -> Tensor:
        frequency = unscaled_frequencies(dim, base)
        turns = self.original_max_positions * frequency / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class LongRopeScaling:
    """Every pair divided by its own factor [LongRoPE: Ding et al. 2024, arXiv:2402.13753].

    Models come with two lists, for inputs up to the original length and for longer ones: choose the one for the
    longest input.
    """

    factors: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for factor in self.factors:
            _check_positive(factors=factor)

    def frequencies(self, dim: int, base: float) -> Tensor:
        if len(self.factors) != dim // 2:
            expected = f"{dim // 2}, one for each pair of {dim} dimensions"
            raise bad_argument("factors", f"{len(self.factors)} values", expected, "check rotary_dim")
        factors = torch.tensor(self.factors, dtype=torch.float64, device="cpu")
        return unscaled_frequencies(dim, base) / factors


@dataclass(frozen=True)
class ProportionalScaling:
    """Only the fastest ``share`` of the pairs turns, by their frequencies among all R dimensions over ``factor``."""

    share: float
    factor: float = 1.0
    attention_factor = None

    def __post_init__(self) -> None:
        _check_positive(share=self.share, factor=self.factor)

    def frequencies(self, dim: int, base: float) -> Tensor:
        frequency = unscaled_frequencies(dim, base) / self.factor
        frequency[int(self.share * dim // 2) :] = 0
        return frequency


def from_hugging_face(
    parameters: Mapping[str, Any] | None, *, max_positions: int | None = None
) -> Scaling | None:
    """The scaling that ``rope_scaling`` (or ``rope_parameters``) of a Hugging Face configuration asks for.

    Args:
        parameters: the dictionary of one kind of layer, with ``rope_type`` (formerly ``type``): default, linear,
            dynamic, yarn, llama3, longrope or proportional. None is no scaling. Its ``rope_theta`` is the base of
            :class:`~flash_attn_ops.rotary.RotaryEmbedding`, and is not read here; neither is
            ``partial_rotary_factor`` (the dim), except by proportional.
        max_positions: ``max_position_embeddings`` of the configuration, or the longest input if that is longer: the
            length for which dynamic and longrope are fixed, and what stands for a missing ``factor``.

    Raises:
        ValueError: an unknown type, or a missing value.
    """
    if parameters is None:
        return None
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _FROM_HUGGING_FACE:
        fix = "use one of them, or compute frequencies with a scaling of your own"
        raise bad_argument("rope_type", repr(kind), " or ".join(map(repr, _FROM_HUGGING_FACE)), fix)
    return _FROM_HUGGING_FACE[kind](_Parameters(kind, parameters, max_positions))


@dataclass(frozen=True)
class _Parameters:
    kind: str
    given: Mapping[str, Any]
    max_positions: int | None

    def __getitem__(self, name: str) -> Any:
        value = self.given.get(name)
        if value is None and name == "original_max_position_embeddings":
            value = self.max_positions
        if value is None:
            raise bad_argument(name, None, f"a value, which {self.kind} needs", "complete the configuration")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        value = self.given.get(name)
        return default if value is None else value

    @property
    def factor(self) -> float:
        """Given, or the ratio of the lengths (DeepSeek-V3, Phi-3)."""
        if self.get("factor") is not None:
            return float(self["factor"])
        if self.max_positions is None or self.get("original_max_position_embeddings") is None:
            return float(self["factor"])  # which says what is missing
        return self.max_positions / self["original_max_position_embeddings"]


def _dynamic(given: _Parameters) -> Scaling:
    original = given["original_max_position_embeddings"]
    return NTKScaling.for_length(given.factor, original, given.max_positions or original)


def _yarn(given: _Parameters) -> Scaling:
    return YarnScaling(
        factor=given.factor,
        original_max_positions=given["original_max_position_embeddings"],
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        given_attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=given.get("truncate", True),
    )


def _llama3(given: _Parameters) -> Scaling:
    return Llama3Scaling(
        factor=given["factor"],
        low_freq_factor=given["low_freq_factor"],
        high_freq_factor=given["high_freq_factor"],
        original_max_positions=given["original_max_position_embeddings"],
    )


def _longrope(given: _Parameters) -> Scaling:
    original = given["original_max_position_embeddings"]
    is_long = (given.max_positions or original) > original
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        factor = given.factor
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRopeScaling(tuple(given["long_factor" if is_long else "short_factor"]), attention_factor)


_FROM_HUGGING_FACE = {
    "default": lambda given: None,
    "linear": lambda given: LinearScaling(given["factor"]),
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": lambda given: ProportionalScaling(
        given.get("partial_rotary_factor", 1.0), given.get("factor", 1.0)
    ),
}
