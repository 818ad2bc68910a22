"""The module that holds the table of angles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument, check_given
from flash_attn_ops.dispatch import has_memory

from .autograd import rotate_pair
from .checks import Positions, Tables, check
from .packed import rotate_packed
from .scaling import Scaling, unscaled_frequencies


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys, with a table of cos and sin that grows with the positions asked for.

    The angle of pair i at position p is ``p * base ** (-2 i / dim)``, or p times the frequencies of ``scaling``,
    computed in float64 and stored in float32: a row of the table depends on its position alone, so growing never
    changes a value and decoding token by token equals one pass over the sequence. The table is no parameter or buffer:
    ``module.bfloat16()`` leaves it exact, and checkpoints do not hold it.

    Args:
        dim: R, the rotated dimensions of every head, even.
        base: of the frequencies.
        interleaved: GPT-J pairs instead of GPT-NeoX halves.
        device: where to build a first table; it follows the queries anyway.
        scaling: one of :mod:`flash_attn_ops.rotary.scaling`, such as ``from_hugging_face(config.rope_scaling)``.
        scale_base: XPos [Sun et al. 2022, arXiv:2212.10554]: pair i of queries is multiplied by
            ``((2 i + 0.4 dim) / (1.4 dim)) ** ((p - scale_center) / scale_base)`` and that of keys divided by it, so
            that scores decay with the distance. 512 in the paper; None is off.
        scale_center: the position whose XPos factor is 1. Scores do not depend on it, but with float16 values the
            factors of far positions overflow: choose the middle of the positions that occur, and keep it.
        inplace: overwrite what is passed, instead of allocating results.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        *,
        scaling: Scaling | None = None,
        scale_base: float | None = None,
        scale_center: int = 0,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise bad_argument("dim", dim, "a positive even number", "rotate an even number of dimensions")
        if not base > 0:
            raise bad_argument("base", base, "a positive number", "use the default, 10000.0")
        if scaling is not None and not hasattr(scaling, "frequencies"):
            fix = "make one of a Hugging Face configuration with from_hugging_face"
            raise bad_argument("scaling", type(scaling).__name__, "a scaling of frequencies, or None", fix)
        if scale_base is not None and not scale_base > 0:
            raise bad_argument("scale_base", scale_base, "a positive number or None", "use 512, or None")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        self.scaling = scaling
        self.scale_base = scale_base
        self.scale_center = scale_center
        self.inplace = inplace
        device = torch.get_default_device() if device is None else torch.device(device)
        self._rows = self._table(0, device)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(q, k)`` rotated, in one launch.

        Args:
            q, k: (B, S, H, D) and (B, S, Hk, D), D >= dim, any floating-point dtype; (T, H, D) and (T, Hk, D) with
                cu_seqlens.
            seqlen_offset: position of the first token; an int, or (B,) int32 or int64.
            max_seqlen: positions that the table must have; needed with a tensor offset, cu_seqlens or position_ids,
                which are not read here.
            cu_seqlens, position_ids: see :func:`~flash_attn_ops.rotary.apply_rotary_emb`.
        """
        check_given(q=q, k=k)
        if q.dim() != k.dim() or q.dim() not in (3, 4) or q.shape[:-2] != k.shape[:-2]:
            got = f"shapes {tuple(q.shape)} and {tuple(k.shape)}"
            raise bad_argument(
                "q and k", got, "(B, S, H, D) and (B, S, Hk, D)", "pass queries and keys of equal S"
            )
        positions = Positions(seqlen_offset, cu_seqlens, None, position_ids)
        tables = self._tables_for(q, positions, max_seqlen)
        check({"q": q, "k": k}, tables, positions, self.inplace)
        return rotate_pair(q, k, tables, positions, self.interleaved, self.inplace)

    def rotate_packed(
        self,
        qkv: Tensor,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        *,
        num_heads_q: int | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """qkv with its queries and keys rotated, in one launch.

        Args:
            qkv: (B, S, 3, H, D), or (B, S, Hq + 2 Hk, D) with num_heads_q; (T, ...) with cu_seqlens.
            num_heads_q: Hq.
            seqlen_offset, max_seqlen, cu_seqlens, position_ids: see :meth:`forward`.
        """
        check_given(qkv=qkv)
        positions = Positions(seqlen_offset, cu_seqlens, None, position_ids)
        tables = self._tables_for(qkv, positions, max_seqlen)
        return rotate_packed(qkv, num_heads_q, tables, positions, self.interleaved, self.inplace)

    def tables(self, positions: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """cos and sin, float32, (at least ``positions``, dim / 2): for :func:`apply_rotary_emb`."""
        tables = self._grown_table(positions, _as_tensors_have_it(device))
        return tables.cos, tables.sin

    def key_tables(self, positions: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The same for keys: other ones with XPos only."""
        tables = self._grown_table(positions, _as_tensors_have_it(device))
        if tables.cos_k is None or tables.sin_k is None:
            return tables.cos, tables.sin
        return tables.cos_k, tables.sin_k

    def _tables_for(self, x: Tensor, positions: Positions, max_seqlen: int | None) -> Tables:
        start = positions.seqlen_offsets
        if max_seqlen is not None:
            return self._grown_table(max_seqlen, x.device)
        unread = {
            "cu_seqlens": positions.cu_seqlens is not None,
            "position_ids": positions.position_ids is not None,
            "a tensor seqlen_offset": isinstance(start, Tensor),
        }
        for name, given in unread.items():
            if given:
                expected = f"the number of positions, with {name}"
                raise bad_argument("max_seqlen", None, expected, "pass the capacity of the cache")
        assert not isinstance(start, Tensor)
        seqlen = x.shape[1] if x.dim() > 1 else 0  # others are refused
        return self._grown_table(start + seqlen, x.device)

    def _grown_table(self, positions: int, device: torch.device) -> Tables:
        rows = len(self._rows.cos)
        if rows < positions:
            self._rows = self._table(max(positions, 2 * rows), device)
        elif not has_memory(self._rows.cos) and device.type != "meta":  # made where there are no values
            self._rows = self._table(rows, device)
        elif self._rows.cos.device != device:
            self._rows = self._moved_table(device)
        return self._rows

    @torch.inference_mode(False)  # as :meth:`_table`
    def _moved_table(self, device: torch.device) -> Tables:
        cos, sin, cos_k, sin_k = self._rows
        keys = (None, None) if cos_k is None or sin_k is None else (cos_k.to(device), sin_k.to(device))
        return Tables(cos.to(device), sin.to(device), *keys)

    @torch.inference_mode(False)  # a table made while generating must serve training too
    def _table(self, positions: int, device: torch.device) -> Tables:
        position = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None]
        frequencies = (
            unscaled_frequencies(self.dim, self.base)
            if self.scaling is None
            else self.scaling.frequencies(self.dim, self.base)
        )
        angle = position * frequencies
        factor = (self.scaling.attention_factor if self.scaling is not None else None) or 1.0
        cos, sin = angle.cos() * factor, angle.sin() * factor
        if self.scale_base is None:
            return Tables(cos.float().to(device), sin.float().to(device))
        pair = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu")
        decay = (pair + 0.4 * self.dim) / (1.4 * self.dim)
        scale = decay ** ((position - self.scale_center) / self.scale_base)
        return Tables(
            *((table * scale).float().to(device) for table in (cos, sin)),
            *((table / scale).float().to(device) for table in (cos, sin)),
        )

    def extra_repr(self) -> str:
        text = f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
        if self.scaling is not None:
            text += f", scaling={self.scaling}"
        if self.scale_base is not None:
            text += f", scale_base={self.scale_base}, scale_center={self.scale_center}"
        return f"{text}, inplace={self.inplace}"


def _as_tensors_have_it(device: torch.device | str) -> torch.device:
    """The device of tensors that are made there: cuda:0 of "cuda", say, which is not equal to it."""
    return torch.empty(0, device=device).device
