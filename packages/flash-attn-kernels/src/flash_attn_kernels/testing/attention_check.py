"""An attention case, computed by the public functions and by the definition, compared by the tolerance law."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import flash_attn_func, flash_attn_varlen_func
from ..inputs import ScoreModifiers
from ..philox import draw_seed_and_offset, keep_mask
from ..reference import attention_reference
from .attention_case import AttentionCase, AttentionTensors, Rows, make_tensors
from .tolerance import assert_within_reference_error

_FEW_ELEMENTS = 1024
_SIGN_DRAWS = 3

Results = dict[str, Tensor]  # "out", "lse", and "d" + the name of each tensor that got a gradient


def check_attention(
    case: AttentionCase, device: torch.device | str = "cuda", *, strict: bool = True
) -> Results:
    """Assert that outputs, LSE and all gradients of a case, through both outputs, obey the tolerance law.

    The reference is the definition in fp64; the scale of the allowed error is its error in the dtype of the case.
    Rows that belong to no sequence must be exactly 0 (-inf in the LSE), and so must the gradients of rows that no
    query may read.

    Args:
        case: the problem.
        device: where to compute.
        strict: require a compiled kernel.

    Returns:
        What the public function made of the case.
    """
    return check_tensors(make_tensors(case, device), strict=strict)


def check_tensors(tensors: AttentionTensors, *, strict: bool = True) -> Results:
    """:func:`check_attention` of tensors that exist already, changed from what the case makes."""
    actual = public_results(tensors, strict=strict)
    assert_results_obey_the_law(actual, tensors)
    _assert_unread_rows_are_zero(tensors, actual)
    return actual


def assert_results_obey_the_law(actual: Results, tensors: AttentionTensors) -> None:
    """The tolerance law for results of these tensors, all that there are or some, however they were computed.

    A gradient of few elements, each a sum over many rows, is at times exact by chance in plain arithmetic. The scale of
    its error is therefore the largest of several such sums, which differ in the signs of the rows' upstream gradients.
    """
    exact, plain = (_Reference(tensors, dtype) for dtype in (torch.float64, tensors.case.dtype))
    exact_results, plain_results = exact.results(), plain.results()
    assert actual.keys() <= exact_results.keys()
    for name in actual:
        expected, approximate = exact_results[name], plain_results[name]
        modifier = name.removeprefix("d")
        if modifier in tensors.modifiers and 0 < expected.numel() <= _FEW_ELEMENTS:
            worst = _largest_finite(approximate - expected)
            for draw in range(_SIGN_DRAWS):
                difference = plain.resigned_gradient(modifier, draw) - exact.resigned_gradient(modifier, draw)
                worst = torch.maximum(worst, _largest_finite(difference))
            approximate = expected + worst
        factor, atol = (2.0, 1e-5) if name in ("out", "lse") else (3.0, 1e-4)
        assert_within_reference_error(
            actual[name], expected, approximate, factor=factor, atol=atol, name=name
        )


def _largest_finite(difference: Tensor) -> Tensor:
    """Plain fp16 sums may overflow: such an element has no error to learn from, the others do."""
    return difference.abs().nan_to_num(nan=0.0, posinf=0.0).amax()


def public_results(tensors: AttentionTensors, *, strict: bool = True) -> Results:
    """What the public function gives for a case. Gradients are left out of paged calls: no kernel has them."""
    leaves = _leaves(tensors, None)
    arguments = {**tensors.arguments, **{name: leaves[name] for name in tensors.modifiers}}
    q, k, v = (leaves[name] for name in "qkv")
    torch.manual_seed(tensors.case.seed)
    attend = flash_attn_func if tensors.case.layout == "dense" else flash_attn_varlen_func
    out, lse = attend(q, k, v, **arguments, return_lse=True, strict=strict)
    assert out.dtype == tensors.q.dtype and lse.dtype == torch.float32
    return {"out": out, "lse": lse, **_gradients(leaves, [out, lse], [tensors.dout, tensors.dlse])}


def reference_results(tensors: AttentionTensors, compute_dtype: torch.dtype) -> Results:
    """The same by the definition, one sequence at a time, every step in ``compute_dtype``."""
    return _Reference(tensors, compute_dtype).results()


class _Reference:
    """A case by the definition, differentiable."""

    def __init__(self, tensors: AttentionTensors, compute_dtype: torch.dtype) -> None:
        case = tensors.case
        # 16-bit leaves keep their own dtypes: the definition converts them, and rounds their gradients on the way back.
        leaves = _leaves(tensors, torch.float64 if compute_dtype == torch.float64 else None)
        self.out = leaves["q"].detach().new_zeros(tensors.dout.shape)
        self.lse = torch.full_like(tensors.dlse, float("-inf"), dtype=compute_dtype)
        self.leaves = leaves
        self.outputs: list[Tensor] = []
        self.upstream: list[Tensor] = []
        for rows in tensors.rows:
            result = attention_reference(
                rows.query(leaves["q"]),
                rows.key(leaves["k"]),
                rows.key(leaves["v"]),
                case.options,
                modifiers=_modifiers_of(rows, tensors, leaves),
                keep_mask=_keep_mask(rows, tensors) if case.dropout_p > 0 else None,
                compute_dtype=compute_dtype,
            )
            rows.query(self.out).copy_(result.out.detach())
            rows.query_lse(self.lse).copy_(result.lse.detach())
            self.outputs += [result.out, result.lse]
            self.upstream += [rows.query(tensors.dout), rows.query_lse(tensors.dlse)]

    def results(self) -> Results:
        return {"out": self.out, "lse": self.lse, **_gradients(self.leaves, self.outputs, self.upstream)}

    def resigned_gradient(self, name: str, draw: int) -> Tensor:
        """One gradient, where the upstream gradients of every row have a random sign that ``draw`` decides."""
        leaf = self.leaves[name]
        generator = torch.Generator(device=leaf.device).manual_seed(draw)
        upstream = []
        for dout, dlse in zip(self.upstream[::2], self.upstream[1::2], strict=True):
            signs = torch.randint(0, 2, dlse.shape, device=leaf.device, generator=generator) * 2 - 1
            upstream += [dout * signs.transpose(1, 2).unsqueeze(-1), dlse * signs]
        return _gradients({name: leaf}, self.outputs, upstream)[f"d{name}"]


def _leaves(tensors: AttentionTensors, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """q, k, v and the modifiers by name, in another dtype if given; those that get a gradient require it."""
    case = tensors.case
    leaves = {"q": tensors.q, "k": tensors.k, "v": tensors.v, **tensors.modifiers}
    for name, x in leaves.items():
        if x.dtype == torch.bool:
            continue
        leaf = x.detach() if dtype is None else x.detach().to(dtype)
        # The gradient of a broadcast bias is a sum that the deterministic kernels do not have; paged calls have none.
        is_broadcast_bias = name == "attn_bias" and case.attn_bias != "bhqk"
        leaves[name] = leaf.requires_grad_(
            not case.is_paged and not (case.deterministic and is_broadcast_bias)
        )
    return leaves


def _gradients(leaves: dict[str, Tensor], outputs: list[Tensor], upstream: list[Tensor]) -> Results:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not wanted:
        return {}
    upstream = [gradient.to(out.dtype) for gradient, out in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream, retain_graph=True)
    return {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def _modifiers_of(rows: Rows, tensors: AttentionTensors, leaves: dict[str, Tensor]) -> ScoreModifiers:
    """The modifiers of some sequences: their batch indices, and as many rows and columns as they have."""
    Sq, Sk = rows.query(tensors.q).shape[1], rows.key(tensors.k).shape[1]

    def of_batch(name: str) -> Tensor | None:
        x = leaves.get(name)
        return x if x is None or x.shape[0] == 1 else x[rows.batch]

    def fit(x: Tensor | None, fill: float) -> Tensor | None:
        return None if x is None else _fit(_fit(x, -2, Sq, fill), -1, Sk, fill)

    padding, slopes = leaves.get("key_padding_mask"), leaves.get("alibi_slopes")
    return ScoreModifiers(
        attn_bias=fit(of_batch("attn_bias"), 0.0),
        attn_mask=fit(of_batch("attn_mask"), False),
        key_padding_mask=None if padding is None else _fit(padding[rows.batch], -1, Sk, False),
        alibi_slopes=slopes.unsqueeze(0)
        if slopes is not None and slopes.dim() == 1
        else of_batch("alibi_slopes"),
        learnable_sink=leaves.get("learnable_sink"),
    )


def _fit(x: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """A dimension that is not 1 cut or filled up to a size."""
    if x.shape[dim] == 1:
        return x
    x = x.narrow(dim, 0, min(size, x.shape[dim]))
    missing = size - x.shape[dim]
    return F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing), value=fill) if missing else x


def _keep_mask(rows: Rows, tensors: AttentionTensors) -> Tensor:
    """The elements that the public function keeps after the same ``torch.manual_seed``."""
    case, device = tensors.case, tensors.q.device
    torch.manual_seed(case.seed)
    seed_and_offset = draw_seed_and_offset(device)
    batch = torch.arange(len(case.lengths), device=device)[rows.batch]
    flat_heads = batch.unsqueeze(-1) * case.heads[0] + torch.arange(case.heads[0], device=device)
    Sq, Sk = rows.query(tensors.q).shape[1], rows.key(tensors.k).shape[1]
    return keep_mask(
        seed_and_offset,
        flat_heads[..., None, None],
        torch.arange(Sq, device=device),
        torch.arange(Sk, device=device),
        case.dropout_p,
    )


def _assert_unread_rows_are_zero(tensors: AttentionTensors, actual: Results) -> None:
    for name in "qkv":
        if f"d{name}" in actual:
            unread = getattr(tensors, name).isnan()
            assert (actual[f"d{name}"][unread] == 0).all(), f"d{name}: rows that no query reads are not 0"
    if tensors.case.layout != "dense":
        outside = tensors.q[:, 0, 0].isnan()
        assert (actual["out"][outside] == 0).all(), "out: rows of no sequence are not 0"
        assert (actual["lse"][:, outside] == float("-inf")).all(), "lse: rows of no sequence are not -inf"
