"""State dicts and files of models spread over several ranks: bit for bit those of one process.

Run by test_models_tensor_parallel_launch.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_models import load_pretrained, save_pretrained
from flash_attn_models.bert import BertForMaskedLM, BertForPreTraining
from flash_attn_models.gpt import GPTLMHeadModel
from flash_attn_models.tensor_parallel import gather_state_dict
from flash_attn_models.vit import ViTForImageClassification
from torch import nn
from whole_and_part import (
    pair,
)


def test_gather_state_dict(group, device, tiny_decoder) -> None:
    config = tiny_decoder("opt-350m", group.size())
    whole, model = pair(GPTLMHeadModel, config, group, False, device)
    gathered = gather_state_dict(model)
    if group.rank() > 0:
        assert gathered is None
        return
    assert gathered is not None and gathered.keys() == whole.state_dict().keys()
    for name, expected in whole.state_dict().items():
        assert torch.equal(gathered[name], expected.cpu()), name


@pytest.mark.parametrize("kind", ["gpt", "bert", "masked_lm", "vit"])
def test_files(kind, group, device, shared_folder, tiny_decoder, tiny_bert, tiny_vit) -> None:
    kinds: dict[str, tuple[type[nn.Module], Any]] = {
        "gpt": (GPTLMHeadModel, tiny_decoder("tinyllama-1.1b", group.size())),
        "bert": (BertForPreTraining, tiny_bert()),
        "masked_lm": (BertForMaskedLM, tiny_bert()),
        "vit": (ViTForImageClassification, tiny_vit()),
    }
    build, config = kinds[kind]
    whole, model = pair(build, config, group, False, device)
    save_pretrained(model, shared_folder)
    with pytest.raises(ValueError, match="a folder that is empty"):
        save_pretrained(model, shared_folder)
    loaded = load_pretrained(shared_folder, device)
    assert type(loaded) is build
    for name, expected in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name
    parallel = load_pretrained(shared_folder, device, process_group=group, sequence_parallel=True)
    assert not parallel.training and parallel.parallel.sequence_parallel
    assert parallel.state_dict().keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        assert torch.equal(parallel.state_dict()[name], expected), name
