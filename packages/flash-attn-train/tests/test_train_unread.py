"""Options that are set and that nothing reads."""

from __future__ import annotations

import pytest
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import (
    BertModelConfig,
    CallbacksConfig,
    GenerationConfig,
    MaskedLMConfig,
    TokenizerConfig,
    TrainConfig,
    check_read,
)
from flash_attn_train.configs.callbacks import EMAConfig
from flash_attn_train.configs.store import all_options, entries
from flash_attn_train.errors import ConfigError
from flash_attn_train.run import train


@pytest.mark.parametrize("mode", ["debug", "profile"])
def test_modes_set_nothing_in_vain(mode: str) -> None:
    for name in ("digits", "stdlib-bert", "owt/gpt2s-hf", "imagenet/vit-small"):
        compose_config([f"experiment={name}", f"mode={mode}"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["experiment=digits", "tokenizer.name=gpt2"],
            r"tokenizer\.name: got gpt2, which nothing reads with task=image_classification; it is for "
            r"task=language_model or masked_lm or sequence_classification\. Leave it out\.$",
        ),
        # The quickstart, which is the experiment where none is named, sets it.
        (
            ["task=image_classification", "model=vit", "data=digits"],
            r"tokenizer\.vocab_size: got 2048.*experiment=none\.$",
        ),
        (
            ["experiment=digits", "generation.prompt=x"],
            r"generation\.prompt: got x.*it is for task=language_model",
        ),
        (
            ["experiment=owt/gpt2s-hf", "generation.top_p=0.5"],
            r"nothing reads with model=hugging_face.*model=gpt\.",
        ),
        (
            ["experiment=digits", "data.cache_dir=x"],
            r"data\.cache_dir: got x.*it is for data=text or hub_text",
        ),
        (
            ["experiment=digits", "task.mix_probability=0.5"],
            r"with task\.mixup_alpha=0\.0 and task\.cutmix_alpha=0",
        ),
        (["experiment=digits", "metrics.perplexity=true"], r"metrics\.perplexity: got true"),
        (["metrics.top_k=[1]"], r"metrics\.top_k: got \[1\].*it is for task=image_classification"),
        (
            ["tokenizer.name=gpt2", "tokenizer.vocab_size=300"],
            r"vocab_size: got 300.*it is for tokenizer\.name=null",
        ),
        (["callbacks.ema.decay=0.5"], r"ema\.decay: got 0\.5.*it is for callbacks\.ema\.enabled=true"),
        (["callbacks.nan_guard.max_skipped_in_a_row=3"], r"it is for trainer\.nan=skip"),
        (["logger.wandb.offline=true"], r"it is for logger\.wandb\.enabled=true"),
        (["data.suffixes=[.md]"], r"with data\.path=null; it is for data\.path other than null"),
        (
            ["model=gpt2", "model.rotary_scaling.kind=linear"],
            r"model\.rotary_scaling: got .*model\.position=rotary",
        ),
        (["generation.temperature=0", "generation.top_k=3"], r"generation\.top_k: got 3.*other than 0\.0"),
        (["data=c4", "data.val_fraction=0.1"], r"data\.val_fraction: got 0\.1.*data\.val_split=null"),
        (
            ["experiment=digits", "mode=smoke", "tokenizer.min_frequency=3"],
            r"tokenizer\.min_frequency: got 3",
        ),
    ],
)
def test_what_nothing_reads_is_named(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config(keys)


@pytest.mark.parametrize(
    "keys",
    [
        # An experiment's vocabulary size is of no use with a tokenizer that is there, which the user need not know.
        ["experiment=quickstart", "tokenizer.name=gpt2"],
        ["experiment=digits", "generation.max_new_tokens=0"],
        ["experiment=digits", "metrics=loss"],
        ["experiment=digits", "task.mix_probability=0.5", "task.cutmix_alpha=1"],
        ["callbacks.ema.enabled=false"],
        ["callbacks.ema.enabled=true", "callbacks.ema.decay=0.5"],
        ["data.path=x", "data.suffixes=[.md]"],
        ["model=llama", "model.rotary_base=5e5"],
        ["experiment=imagenet/vit-small", "mode=smoke", "data.num_workers=0"],
    ],
)
def test_what_is_read_or_asks_for_nothing(keys: list[str]) -> None:
    compose_config(keys)


def test_from_python() -> None:
    bert = BertModelConfig(max_seqlen=8, n_layer=1, n_head=2, d_model=16)
    config = TrainConfig(task=MaskedLMConfig(), model=bert, generation=GenerationConfig(prompt="x"))
    with pytest.raises(ConfigError, match=r"generation\.prompt: got x"):
        train(config)
    # What another option keeps from being read is an error on the command line only.
    check_read(TrainConfig(callbacks=CallbacksConfig(ema=EMAConfig(decay=0.5))))
    check_read(TrainConfig(tokenizer=TokenizerConfig(name="gpt2", vocab_size=300)))


def test_conditions_name_options_and_entries_that_there_are() -> None:
    keys = {option.key for _, found in all_options() for option in found}
    for _, found in all_options():
        for option in found:
            for condition in option.metadata["read"]:
                for key in condition.keys:
                    assert key in keys or set(condition.values) <= set(entries(key)), (option.key, key)
