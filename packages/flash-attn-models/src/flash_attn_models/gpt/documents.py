"""Packed documents as the input of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.packed import Documents


def read_documents(
    input_ids: Tensor,
    context: int,
    device: torch.device,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    **excluded: object,
) -> Documents | None:
    """The documents that packed input_ids (T,) are; None without ``cu_seqlens``.

    Args:
        context: how many tokens a document may have.
        device: of the model.
        cu_seqlens, max_seqlen: see ``GPTLMHeadModel.forward``.
        excluded: by name, arguments that packed input does not go with.
    """
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise bad_argument(
                "max_seqlen", max_seqlen, "None without cu_seqlens", "leave it out, or pass cu_seqlens"
            )
        return None
    for name, value in excluded.items():
        if value is not None:
            raise bad_argument(
                name,
                f"a {type(value).__name__} beside cu_seqlens",
                "None: packed documents are for training and evaluation",
                f"leave {name} out, or pass a batch of shape (batch, seqlen)",
            )
    if input_ids.ndim != 1 or input_ids.dtype not in (torch.int32, torch.int64) or input_ids.device != device:
        raise bad_argument(
            "input_ids",
            f"shape {tuple(input_ids.shape)}, {input_ids.dtype} on {input_ids.device}",
            f"integers of shape (tokens,), since cu_seqlens is given, int64 or int32, on {device}",
            "use input_ids.flatten(), .long() or .to(device)",
        )
    documents = Documents.of(cu_seqlens, max_seqlen, input_ids.shape[0], device)
    if documents.max_seqlen > context:
        raise bad_argument(
            "cu_seqlens" if max_seqlen is None else "max_seqlen",
            f"a document of {documents.max_seqlen} tokens",
            f"at most the context of max_seqlen={context} tokens",
            "cut long documents, or build the model with a larger max_seqlen",
        )
    return documents
