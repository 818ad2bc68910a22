"""The kernels' paths up to their operators: on the CPU, with operators of the same schemas that compute portably.

What differs from a call on a GPU is the kernels alone: arguments, conversions, autograd and torch.compile are as there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_attn_kernels import (
    call,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    library,
    portable,
)
from flash_attn_kernels.dispatch import Explanation
from flash_attn_kernels.inputs import AttentionInputs, PackedLayout, ScoreModifiers
from flash_attn_kernels.options import AttentionOptions
from torch import Tensor

_OPTIONS = "float softmax_scale, int window_left, int window_right, bool top_left"
_TENSORS = (
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
_OPTIONAL = ", ".join(("float softcap=0., float dropout_p=0.", *(f"Tensor? {x}=None" for x in _TENSORS)))
FORWARD = f"forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}, {_OPTIONAL}) -> (Tensor, Tensor)"
FORWARD_DENSE = (
    "forward_dense(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> (Tensor, Tensor)"
)
BACKWARD = (
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool deterministic,"
    f" {_OPTIONS}, {_OPTIONAL}, Tensor? dlse=None, bool needs_attn_bias=False, bool needs_alibi_slopes=False,"
    " bool needs_learnable_sink=False, bool one_gradient=False)"
    " -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)"
)
FORWARD_SM90 = (
    f"forward_sm90(Tensor q, Tensor k, Tensor v, {_OPTIONS}, float softcap=0., Tensor? learnable_sink=None,"
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None)"
    " -> (Tensor, Tensor)"
)


def inputs_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    **tensors: Tensor,
) -> AttentionInputs:
    cu_q, cu_k, used_q, used_k, table, bias, mask, padding, slopes, sink, seed = map(tensors.get, _TENSORS)
    for name, x in (("slopes", slopes), ("sink", sink)):
        assert x is None or (x.dtype == torch.float32 and x.is_contiguous()), name
    options = AttentionOptions(
        softmax_scale,
        None if window_left == -1 else window_left,
        None if window_right == -1 else window_right,
        softcap,
        dropout_p,
        top_left=top_left,
    )
    modifiers = ScoreModifiers(bias, mask, padding, slopes, sink)
    packed = None if cu_q is None else PackedLayout(cu_q, cu_k, used_q, used_k, table)
    return AttentionInputs(q, k, v, options, modifiers, seed, packed)


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Torch leaves out the arguments after the last one that differs from its default."""
    names = ("softmax_scale", "window_left", "window_right", "top_left", "softcap", "dropout_p", *_TENSORS)
    out, lse = portable.forward(inputs_of(q, k, v, **dict(zip(names, options, strict=False))))
    return out, lse.float()


def forward_dense(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, softmax_scale, -1, 0 if causal else -1, False)


def forward_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    *lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout = (*lengths, *(None,) * (4 - len(lengths)))
    others = (None, None, None, None, None, learnable_sink)
    return forward(
        q, k, v, softmax_scale, window_left, window_right, top_left, softcap, 0.0, *layout, *others
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    deterministic: bool,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """As the kernels do it: per-sequence gradients of slopes and sink, in fp32."""
    names = ("softmax_scale", "window_left", "window_right", "top_left", "softcap", "dropout_p", *_TENSORS)
    asked = ("dlse", "bias", "slopes", "sink", "one_gradient")
    given = dict(zip((*names, *asked), options, strict=False))
    dlse, *needed, one_gradient = (given.pop(name, None) for name in asked)
    needs_bias, needs_slopes, needs_sink = map(bool, needed)
    assert dlse is None or (dlse.dtype == torch.float32 and dlse.is_contiguous())
    inputs = inputs_of(q, k, v, **given)
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
    dbias = dslopes = dsink = None
    if needs_bias:
        is_full = inputs.packed is None and bias.shape == (batch, q.shape[2], q.shape[1], k.shape[1])
        dbias = gradients.attn_bias.contiguous() if is_full else gradients.attn_bias.float().contiguous()
    if needs_slopes:
        dslopes = gradients.alibi_slopes.contiguous()
    if needs_sink:  # all of it in the first sequence: only the sum is looked at
        dsink = torch.cat([gradients.learnable_sink[None], torch.zeros(batch - 1, q.shape[-2])])
    dqkv = (x.clone(memory_format=torch.contiguous_format) for x in (gradients.q, gradients.k, gradients.v))
    if one_gradient:
        dqkv = torch.cat(list(dqkv), dim=-2), k.new_empty(0), v.new_empty(0)
    return (*dqkv, dbias, dslopes, dsink)


@pytest.fixture(scope="module")
def operators() -> Iterator[Any]:
    """``torch.ops.flash_attn_stand_in.forward`` and its neighbours."""
    definition = torch.library.Library("flash_attn_stand_in", "DEF")
    for schema, kernel, fake in STAND_INS:
        definition.define(schema)
        definition.impl(kernel.__name__, kernel, "CPU")
        torch.library.register_fake(f"flash_attn_stand_in::{kernel.__name__}", fake, lib=definition)
    yield torch.ops.flash_attn_stand_in
    definition._destroy()


STAND_INS = (
    (FORWARD, forward, library._fake_sm80_forward),
    (FORWARD_DENSE, forward_dense, library._fake_forward_dense),
    (BACKWARD, backward, library._fake_backward),
    (FORWARD_SM90, forward_sm90, library._fake_sm90_forward),
)


def run_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "choose_path", lambda problem: Explanation(path, {"sm80": ("asked for",)}))


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch, operators: Any, no_plans_kept: None) -> None:
    monkeypatch.setattr(library, "sm80_forward", operators.forward.default)
    monkeypatch.setattr(library, "sm80_forward_dense", operators.forward_dense.default)
    monkeypatch.setattr(library, "sm80_backward", operators.backward.default)
    monkeypatch.setattr(library, "sm90_forward", operators.forward_sm90.default)
    monkeypatch.setattr(library, "sm90_forward_dense", operators.forward_dense.default)
    monkeypatch.setattr(library, "sm90_backward", operators.backward.default)
    run_on("sm80", monkeypatch)


@pytest.fixture
def fresh_compiler() -> None:
    """The compiler counts how often it compiled one function, over all tests."""
    torch._dynamo.reset()


def on_the_portable_path(function, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        run_on("portable", patch)
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


# The sm90 path: another forward, the same backward


@pytest.fixture
def sm90_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go to the sm90 path, and no other has a forward."""
    run_on("sm90", monkeypatch)
    monkeypatch.setattr(library, "sm80_forward", None)
    monkeypatch.setattr(library, "sm80_forward_dense", None)


SM90_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "options": {"causal": True, "window_size": (4, 0), "softmax_scale": 0.3, "deterministic": True},
    "top left": {"window_size": (2, 3), "causal_alignment": "top-left"},
    "sink": {"learnable_sink": torch.linspace(-1, 1, 8)[::2].half().requires_grad_(), "softcap": 2.0},
}
SM90_PACKED_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"causal": True, "softcap": 2.0},
    "seqused": USED,
    "sink": {"learnable_sink": torch.linspace(-1, 1, 4).requires_grad_(), **USED},
}


@pytest.mark.parametrize("name", SM90_CASES)
def test_dense_calls_of_sm90(name: str, sm90_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**leaves(), **SM90_CASES[name]}
    actual = gradients(flash_attn_func, arguments)
    expected = on_the_portable_path(lambda: gradients(flash_attn_func, arguments), monkeypatch)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", SM90_PACKED_CASES)
def test_packed_calls_of_sm90(name: str, sm90_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**packed_leaves(), "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, **SM90_PACKED_CASES[name]}
    actual = gradients(flash_attn_varlen_func, arguments)
    expected = on_the_portable_path(lambda: gradients(flash_attn_varlen_func, arguments), monkeypatch)
    torch.testing.assert_close(actual, expected)


def test_calls_of_sm90_compile_to_one_graph(sm90_alone: None, fresh_compiler: None) -> None:
    arguments = {**leaves(), **SM90_CASES["sink"]}
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(gradients(compiled, arguments), gradients(flash_attn_func, arguments))
    arguments = {**packed_leaves(), "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, **SM90_PACKED_CASES["sink"]}
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(gradients(compiled, arguments), gradients(flash_attn_varlen_func, arguments))


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_a_plain_call_passes_few_arguments(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that crosses the boxed interface costs time: what has a default is left out."""
    calls: dict[str, int] = {}

    def count_arguments_of(name: str) -> None:
        operator = getattr(library, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            calls[name] = len(arguments) + len(named)
            return operator(*arguments, **named)

        monkeypatch.setattr(library, name, counting)

    for name in ("sm80_forward_dense", "sm80_backward", "sm90_forward_dense", "sm90_backward"):
        count_arguments_of(name)
    run_on(path, monkeypatch)
    flash_attn_func(**leaves(), causal=True).sum().backward()
    assert calls == {f"{path}_forward_dense": 5, f"{path}_backward": 11}


@pytest.mark.parametrize("path", ["sm80", "sm90"])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_gradient_of_heads_in_one_tensor(
    path: str, compiled: bool, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    """The operator makes it: nothing is put together behind it."""
    run_on(path, monkeypatch)
    heads = torch.randn(2, 9, 8, 8, requires_grad=True)
    sink = torch.randn(4, requires_grad=True)

    def attend(heads: Tensor, sink: Tensor) -> Tensor:
        return flash_attn_qkvpacked_func(heads, causal=True, learnable_sink=sink, num_heads_q=4)

    def apart(heads: Tensor, sink: Tensor) -> Tensor:
        return flash_attn_func(*heads.split((4, 2, 2), dim=2), causal=True, learnable_sink=sink)

    expected = torch.autograd.grad(apart(heads, sink).sin().sum(), (heads, sink))
    joined: list[int] = []
    cat = torch.cat
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    loss = function(heads, sink).sin().sum()
    monkeypatch.setattr(torch, "cat", lambda *args, **named: (joined.append(1), cat(*args, **named))[1])
    gradients = torch.autograd.grad(loss, (heads, sink))
    torch.testing.assert_close(gradients, expected)
    # The stand-in for the operator joins them, and the sink's.
    assert len(joined) == 2


# The operators' schemas and fakes


def test_fakes_describe_what_the_operators_return(operators: Any) -> None:
    dense = [x.detach() for x in leaves().values()]
    options = (0.5, -1, 0, False)
    for operator in (operators.forward, operators.forward_sm90):
        torch.library.opcheck(operator.default, (*dense, *options))
    torch.library.opcheck(operators.forward_dense.default, (*dense, 0.5, True))
    out, lse = operators.forward(*dense, *options)
    modifiers = {"attn_bias": torch.randn(1, 4, 9, 11), "alibi_slopes": torch.rand(1, 4)}
    modifiers["learnable_sink"] = torch.rand(4)
    for needed in (False, True):
        torch.library.opcheck(
            operators.backward.default,
            (out, *dense, out, lse, False, *options),
            {**modifiers, **{f"needs_{name}": needed for name in modifiers}},
        )
    heads = torch.randn(2, 9, 8, 8).split((4, 2, 2), dim=2)
    out, lse = operators.forward(*heads, *options)
    arguments = (out, *heads, out, lse, False, *options)
    torch.library.opcheck(operators.backward.default, arguments, {"one_gradient": True})


@pytest.mark.parametrize("schema, kernel, fake", STAND_INS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_stand_in_has_the_schemas_of_the_fakes(
    schema: str, kernel: Any, fake: Any, operators: Any
) -> None:
    arguments = getattr(operators, kernel.__name__).default._schema.arguments
    parameters = inspect.signature(fake).parameters
    assert [argument.name for argument in arguments] == list(parameters)
    for argument in arguments:
        default = parameters[argument.name].default
        assert (default is not inspect.Parameter.empty) == argument.has_default_value()
        assert not argument.has_default_value() or default == argument.default_value
