"""Detokenisers on examples of each corpus's spelling."""

from __future__ import annotations

import pytest
from flash_attn_train.configs.checks import options
from flash_attn_train.configs.data import TextDataConfig
from flash_attn_train.data.detokenizers import DETOKENIZERS


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", " a , b ", " a , b "),
        ("wikitext", "a well @-@ known 1 @,@ 200 @.@ 5 km", "a well-known 1,200.5 km"),
        ("wikitext", 'He said : " Go home ! " ( twice ) .', 'He said: "Go home!" (twice).'),
        (
            "wikitext",
            "the game 's end , players ' rights ; 50 % of $ 3",
            "the game's end, players' rights; 50% of $3",
        ),
        ("wikitext", " = Robert Boulter = \n \n Text , \n", " = Robert Boulter =\n\n Text,\n"),
        ("ptb", "mr. vinken does n't say it 's $ N million", "mr. vinken doesn't say it's $N million"),
        ("ptb", " a <unk> of N % \n next line ", "a <unk> of N%\nnext line"),
        (
            "lm1b",
            "They 're here , the boys ' toys cost $ 1 , 200 .",
            "They're here, the boys' toys cost $1,200.",
        ),
        ("lm1b", 'She said " I do n\'t know " ( again ) .', 'She said "I don\'t know" (again).'),
        ("lambada", "“ do n't , ” he said", '\n"don\'t," he said'),
        ("lambada", "`` yes ! '' it ’s", '\n"yes!" it\'s'),
    ],
)
def test_examples(name: str, text: str, expected: str) -> None:
    assert DETOKENIZERS[name](text) == expected


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_ordinary_prose_is_kept(name: str) -> None:
    text = 'It rained in 1999; we (all of us) said: "no, don\'t!" and left.'
    assert DETOKENIZERS[name](text).strip() == text
    assert DETOKENIZERS[name]("").strip() == ""


def test_config_names_them_all() -> None:
    (option,) = [item for item in options(TextDataConfig, "data.") if item.key == "data.detokenizer"]
    assert option.metadata["choices"] == tuple(DETOKENIZERS)
