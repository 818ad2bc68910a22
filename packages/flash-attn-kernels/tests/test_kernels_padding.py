"""Unpadding and padding: values, indices and gradients, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels.padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
INDICES = [0, 1, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("trailing", [(), (5,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_unpad(trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, *trailing)
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK.to(dtype))
    assert torch.equal(tokens, x.flatten(0, 1)[INDICES])
    assert indices.tolist() == INDICES and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 3, 7] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and isinstance(longest, int)
    assert seqused.tolist() == [3, 0, 4] and seqused.dtype == torch.int32


def test_unused_tokens_have_room_and_do_not_count() -> None:
    x = torch.randn(3, 4, 2)
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # one of them is in MASK too
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK, unused)
    assert indices.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11] and tokens.shape == (9, 2)
    assert cu_seqlens.tolist() == [0, 4, 5, 9] and longest == 4
    assert seqused.tolist() == [3, 0, 4]


def test_pad_is_the_inverse() -> None:
    x = torch.randn(3, 4, 2, 3, requires_grad=True)
    tokens, indices, *_ = unpad_input(x, MASK)
    padded = pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, x * MASK[..., None, None])
    gradient = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(padded, x, gradient)[0], gradient * MASK[..., None, None])


@pytest.mark.parametrize("batch, seqlen", [(0, 4), (3, 0), (3, 4)])
def test_nothing_to_keep(batch: int, seqlen: int) -> None:
    x = torch.randn(batch, seqlen, 2, requires_grad=True)
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, torch.zeros(batch, seqlen))
    assert tokens.shape == (0, 2) and cu_seqlens.tolist() == [0] * (batch + 1) and longest == 0
    assert seqused.tolist() == [0] * batch
    padded = pad_input(tokens, indices, batch, seqlen)
    assert padded.shape == x.shape and (padded == 0).all()
    assert torch.equal(torch.autograd.grad(padded.sum(), x)[0], torch.zeros_like(x))


def test_several_sequences_in_a_row() -> None:
    x = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert longest == 6
    none = unpad_input_for_concatenated_sequences(x, torch.zeros_like(lengths))
    assert none[0].shape == (0, 2) and none[2].tolist() == [0] and none[3] == 0


def test_gradients() -> None:
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 5])
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    assert torch.autograd.gradcheck(lambda values: index_put_first_axis(values, indices, 6), values)
    assert torch.autograd.gradcheck(lambda x: index_first_axis_residual(x, indices), x)


def test_gradients_of_a_repeated_index_add_up() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(index_first_axis(x, torch.tensor([1, 1, 3])).sum(), x)
    assert gradient[:, 0].tolist() == [0.0, 2.0, 0.0, 1.0]


def test_the_residual_leaves_the_gradient_it_gets_alone() -> None:
    """Nothing is added into a gradient that others may be reading."""
    x = torch.randn(4, 2, requires_grad=True)
    rows, residual = index_first_axis_residual(x, torch.tensor([1, 3]))
    assert torch.equal(rows, x[[1, 3]]) and torch.equal(residual, x)
    of_rows, of_residual = torch.ones(2, 2), torch.ones(4, 2)
    (gradient,) = torch.autograd.grad((rows, residual), x, (of_rows, of_residual))
    assert gradient[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert (of_residual == 1).all()


def test_16_bit_tokens_keep_their_dtype() -> None:
    x = torch.randn(3, 4, 2).bfloat16()
    tokens, indices, *_ = unpad_input(x, MASK)
    assert tokens.dtype == pad_input(tokens, indices, 3, 4).dtype == torch.bfloat16


@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_compiles() -> None:
    """One graph, though the number of tokens is known only when it runs."""
    x, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])

    def there_and_back(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        tokens, indices, cu_seqlens, longest, _ = unpad_input(x, mask)
        return pad_input(tokens * 2.0, indices, *mask.shape), cu_seqlens, longest

    lengths = torch.tensor([[1, 2, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    for function, argument in ((there_and_back, mask), (unpad_input_for_concatenated_sequences, lengths)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(compiled(x, argument), function(x, argument), strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))
