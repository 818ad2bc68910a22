"""What a person wants to know of a corpus before the wait."""

from __future__ import annotations

from flash_attn_train.data.prepare import PreparedData
from flash_attn_train.data.source import TextSource


def describe_prepared(source: TextSource, prepared: PreparedData) -> dict[str, str]:
    """Lines by name."""
    sizes = ", ".join(
        f"{split.num_documents:,} documents ({split.num_bytes / 1e6:.1f} MB) {use}"
        for split, use in (
            (prepared.splits["train"], "to train on"),
            (prepared.splits["validation"], "held out"),
        )
    )
    return {
        "corpus": ", ".join(part for part in (f"{source.title}: {sizes}", source.notes()) if part),
        "tokens": f"{len(prepared.train):,} to train on, {len(prepared.validation):,} held out, vocabulary of "
        f"{prepared.vocab_size:,}{' (from the cache)' if prepared.from_cache else ''}",
    }
