"""The sm80 path up to its operators: on the CPU, with operators of the same schemas that compute on the portable path.

What differs from a call on a GPU is the kernels alone: arguments, conversions, autograd and torch.compile are as there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_attn_kernels import call, flash_attn_func, flash_attn_varlen_func, library, portable
from flash_attn_kernels.dispatch import Explanation
from flash_attn_kernels.inputs import AttentionInputs, PackedLayout, ScoreModifiers
from flash_attn_kernels.options import AttentionOptions
from torch import Tensor

_TENSORS = ", ".join(
    f"Tensor? {name}"
    for name in (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "seqused_q",
        "seqused_k",
        "block_table",
        "attn_bias",
        "attn_mask",
        "key_padding_mask",
        "alibi_slopes",
        "learnable_sink",
        "seed_and_offset",
    )
)
_OPTIONS = (
    "float softmax_scale, int window_left, int window_right, bool top_left, float softcap, float dropout_p"
)
FORWARD = f"forward(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)"
BACKWARD = (
    f"backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, {_TENSORS}, {_OPTIONS},"
    " bool deterministic, bool needs_attn_bias, bool needs_alibi_slopes, bool needs_learnable_sink)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def inputs_of(q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...]) -> AttentionInputs:
    cu_q, cu_k, used_q, used_k, table, bias, mask, padding, slopes, sink, seed = arguments[:11]
    scale, left, right, top_left, softcap, dropout_p = arguments[11:17]
    for name, x in (("slopes", slopes), ("sink", sink)):
        assert x is None or (x.dtype == torch.float32 and x.is_contiguous()), name
    options = AttentionOptions(
        scale,
        None if left == -1 else left,
        None if right == -1 else right,
        softcap,
        dropout_p,
        top_left=top_left,
    )
    modifiers = ScoreModifiers(bias, mask, padding, slopes, sink)
    packed = None if cu_q is None else PackedLayout(cu_q, cu_k, used_q, used_k, table)
    return AttentionInputs(q, k, v, options, modifiers, seed, packed)


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = portable.forward(inputs_of(q, k, v, arguments))
    return out, lse.float()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """As the kernels do it: per-sequence gradients of slopes and sink, in fp32."""
    assert dlse is None or (dlse.dtype == torch.float32 and dlse.is_contiguous())
    needs_bias, needs_slopes, needs_sink = arguments[18:21]
    inputs = inputs_of(q, k, v, arguments)
    batch = q.shape[0] if inputs.packed is None else inputs.packed.cu_seqlens_q.shape[0] - 1
    bias, sink = inputs.modifiers.attn_bias, inputs.modifiers.learnable_sink
    slopes = inputs.modifiers.alibi_slopes
    gradients = portable.backward(
        AttentionInputs(
            q,
            k,
            v,
            inputs.options,
            ScoreModifiers(
                bias,
                inputs.modifiers.attn_mask,
                inputs.modifiers.key_padding_mask,
                None if slopes is None else slopes.expand(batch, -1),
                sink,
            ),
            inputs.seed_and_offset,
            inputs.packed,
        ),
        out,
        lse,
        dout,
        dlse,
        needs_attn_bias=needs_bias,
        needs_alibi_slopes=needs_slopes,
        needs_learnable_sink=needs_sink,
    )
    nothing = q.new_empty(0, dtype=torch.float32)
    dbias, dslopes, dsink = (nothing.clone() for _ in range(3))
    if needs_bias:
        is_full = inputs.packed is None and bias.shape == (batch, q.shape[2], q.shape[1], k.shape[1])
        dbias = gradients.attn_bias.contiguous() if is_full else gradients.attn_bias.float().contiguous()
    if needs_slopes:
        dslopes = gradients.alibi_slopes.contiguous()
    if needs_sink:  # all of it in the first sequence: only the sum is looked at
        dsink = torch.cat([gradients.learnable_sink[None], torch.zeros(batch - 1, q.shape[-2])])
    dqkv = (x.clone(memory_format=torch.contiguous_format) for x in (gradients.q, gradients.k, gradients.v))
    return (*dqkv, dbias, dslopes, dsink)


def forward_dense(operators: Any, q: Tensor, k: Tensor, v: Tensor, *scale_and_window: Any) -> Any:
    return operators.forward.default(q, k, v, *(None,) * 11, *scale_and_window, 0.0, 0.0)


@pytest.fixture(scope="module")
def operators() -> Iterator[Any]:
    """``torch.ops.flash_attn_stand_in.forward`` and ``.backward``."""
    definition = torch.library.Library("flash_attn_stand_in", "DEF")
    for schema, kernel, fake in (
        (FORWARD, forward, library._fake_sm80_forward),
        (BACKWARD, backward, library._fake_sm80_backward),
    ):
        definition.define(schema)
        definition.impl(kernel.__name__, kernel, "CPU")
        torch.library.register_fake(f"flash_attn_stand_in::{kernel.__name__}", fake, lib=definition)
    yield torch.ops.flash_attn_stand_in
    definition._destroy()


@pytest.fixture(autouse=True)
def sm80_on_the_cpu(monkeypatch: pytest.MonkeyPatch, operators: Any) -> None:
    monkeypatch.setattr(library, "sm80_forward", operators.forward.default)
    monkeypatch.setattr(library, "sm80_forward_dense", functools.partial(forward_dense, operators))
    monkeypatch.setattr(library, "sm80_backward", operators.backward.default)
    monkeypatch.setattr(call, "choose_path", lambda problem: Explanation("sm80", ()))
    monkeypatch.setattr(call, "_cached_plan", call._plan)


@pytest.fixture
def fresh_compiler() -> None:
    """The compiler counts how often it compiled one function, over all tests."""
    torch._dynamo.reset()


def on_the_portable_path(function, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(call, "choose_path", lambda problem: Explanation("portable", ("asked for",)))
        return function()


def leaves(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return {"q": randn(2, 9, 4, 8), "k": randn(2, 11, 2, 8), "v": randn(2, 11, 2, 6)}


def packed_leaves(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: x.detach().flatten(0, 1).requires_grad_() for name, x in leaves(dtype).items()}


CU_Q, CU_K = torch.tensor([0, 3, 3, 18], dtype=torch.int32), torch.tensor([0, 5, 7, 20], dtype=torch.int32)
USED = {
    "seqused_q": torch.tensor([2, 0, 15], dtype=torch.int32),
    "seqused_k": torch.tensor([5, 1, 12], dtype=torch.int32),
}


def gradients(function, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients of everything in ``arguments`` that wants one."""
    wanted = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    torch.manual_seed(11)
    out, lse = function(**arguments, return_lse=True)
    loss = out.float().square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
    found = torch.autograd.grad(loss, list(wanted.values()))
    for x, gradient in zip(wanted.values(), found, strict=True):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, found, strict=True))}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {
        "causal": True,
        "window_size": (4, 0),
        "softcap": 2.0,
        "softmax_scale": -0.3,
        "deterministic": True,
    },
    "top left": {"window_size": (2, 3), "causal_alignment": "top-left"},
    "dropout": {"dropout_p": 0.3},
    "full bias": {"attn_bias": torch.linspace(-1, 1, 2 * 4 * 9 * 11).reshape(2, 4, 9, 11).requires_grad_()},
    "bias of two dimensions": {"attn_bias": torch.linspace(-1, 1, 99).reshape(9, 11).half().requires_grad_()},
    "slopes": {"alibi_slopes": torch.linspace(0, 1, 4, dtype=torch.float64).requires_grad_()},
    "slopes of each sequence": {
        "alibi_slopes": torch.linspace(0, 1, 8).reshape(2, 4).bfloat16().requires_grad_()
    },
    "strided slopes": {"alibi_slopes": torch.linspace(0, 1, 8)[::2].requires_grad_()},
    "sink": {"learnable_sink": torch.linspace(-1, 1, 4).half().requires_grad_()},
    "masks": {
        "attn_mask": torch.ones(9, 11).tril(3) > 0,
        "key_padding_mask": torch.arange(22).reshape(2, 11) % 5 > 0,
    },
    "unwanted gradients": {
        "attn_bias": torch.ones(1, 1),
        "alibi_slopes": torch.ones(4),
        "learnable_sink": torch.ones(4),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_dense_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**leaves(), **CASES[name]}
    actual = gradients(flash_attn_func, arguments)
    expected = on_the_portable_path(lambda: gradients(flash_attn_func, arguments), monkeypatch)
    torch.testing.assert_close(actual, expected)


PACKED_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"causal": True, "softcap": 2.0, "dropout_p": 0.2},
    "seqused": USED,
    "bias": {"attn_bias": torch.linspace(-1, 1, 3 * 7 * 9).reshape(3, 1, 7, 9).requires_grad_()},
    "slopes": {"alibi_slopes": torch.linspace(0, 1, 12).reshape(3, 4).requires_grad_()},
    "sink": {"learnable_sink": torch.linspace(-1, 1, 4).requires_grad_(), **USED},
    "masks": {
        "attn_mask": torch.ones(4, 1, 1) > 0,
        "key_padding_mask": torch.arange(39).reshape(3, 13) % 5 > 0,
    },
}


@pytest.mark.parametrize("name", PACKED_CASES)
def test_packed_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**packed_leaves(), "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, **PACKED_CASES[name]}
    actual = gradients(flash_attn_varlen_func, arguments)
    expected = on_the_portable_path(lambda: gradients(flash_attn_varlen_func, arguments), monkeypatch)
    torch.testing.assert_close(actual, expected)


def test_paged_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    q = packed_leaves()["q"].detach()
    pages = torch.randn(9, 3, 2, 8)
    table = torch.arange(15, dtype=torch.int32).reshape(3, 5) % 9
    lengths = torch.tensor([0, 5, 7, 20], dtype=torch.int32)

    def attend() -> Tensor:
        return flash_attn_varlen_func(q, pages, pages, CU_Q, lengths, block_table=table, causal=True)

    torch.testing.assert_close(attend(), on_the_portable_path(attend, monkeypatch))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["plain", "options", "dropout", "full bias", "slopes", "sink", "masks"])
def test_dense_calls_compile_to_one_graph(name: str, dynamic: bool, fresh_compiler: None) -> None:
    arguments = {**leaves(), **CASES[name]}
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(gradients(compiled, arguments), gradients(flash_attn_func, arguments))


@pytest.mark.parametrize("name", PACKED_CASES)
def test_packed_calls_compile_to_one_graph(name: str, fresh_compiler: None) -> None:
    arguments = {**packed_leaves(), "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, **PACKED_CASES[name]}
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(gradients(compiled, arguments), gradients(flash_attn_varlen_func, arguments))


def test_one_tensor_in_several_places_compiles(fresh_compiler: None) -> None:
    """Self-attention has one cu_seqlens, and k may be v."""

    def attend(q: Tensor, cu: Tensor, **arguments: Any) -> Any:
        return flash_attn_varlen_func(
            q, q, q, cu, cu, seqused_q=cu[1:], seqused_k=cu[1:], causal=True, **arguments
        )

    q = packed_leaves()["q"]
    arguments = {"q": q, "cu": torch.tensor([0, 18], dtype=torch.int32)}
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, arguments), gradients(attend, arguments))


def test_compiled_once_for_all_lengths(fresh_compiler: None) -> None:
    compilations = 0

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(flash_attn_func, fullgraph=True, backend=counting, dynamic=True)
    for length in (5, 9, 33):
        x = torch.randn(2, length, 4, 8)
        y = torch.randn(2, length + 4, 4, 8)
        torch.testing.assert_close(compiled(x, y, y.clone()), flash_attn_func(x, y, y))
    assert compilations == 1


def test_fakes_describe_what_the_operators_return(operators: Any) -> None:
    dense = [x.detach() for x in leaves().values()]
    no_tensors, options = (None,) * 11, (0.5, -1, 0, False, 0.0, 0.0)
    arguments = (*dense, *no_tensors, *options)
    torch.library.opcheck(operators.forward.default, arguments, test_utils=("test_schema", "test_faketensor"))
    out, lse = operators.forward(*arguments)
    bias, slopes, sink = torch.randn(1, 4, 9, 11), torch.rand(1, 4), torch.rand(4)
    others = (None, None, None, None, None, bias, None, None, slopes, sink, None)
    for needed in (False, True):
        torch.library.opcheck(
            operators.backward.default,
            (out, *dense, out, lse, None, *others, *options, False, needed, needed, needed),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_stand_in_has_the_schemas_of_the_fakes(operators: Any) -> None:
    for operator, fake in (
        (operators.forward, library._fake_sm80_forward),
        (operators.backward, library._fake_sm80_backward),
    ):
        names = [argument.name for argument in operator.default._schema.arguments]
        assert names == list(inspect.signature(fake).parameters)
