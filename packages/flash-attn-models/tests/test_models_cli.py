"""The command flash-attn-generate, on a tiny saved model with a tiny tokenizer."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys

import pytest
import torch
from flash_attn_models.cli import main
from flash_attn_models.cli.text import GrowingText, IdCodec
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.pretrained import load_pretrained, save_pretrained

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a tokenizer of bytes with an end id."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    save_pretrained(
        GPTLMHeadModel(
            GPTConfig(vocab_size=257, max_seqlen=64, n_layer=1, n_head=2, d_model=32, initializer_range=0.3)
        ),
        path,
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<|end|>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


def tokenizer_of(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def expected_text(folder, prompt, n, **options):
    tokenizer = tokenizer_of(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    tokens = generate(load_pretrained(folder), ids, n, eos_token_id=256, **options)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_it_continues_a_prompt(folder, capsys, stream):
    code, out, err = run(
        capsys, folder, "--prompt", "Once upon", "--max-new-tokens", 20, stream, "--device", "cpu"
    )
    assert code == 0, err
    assert out == expected_text(folder, "Once upon", 20) + "\n"
    assert err.startswith("20 tokens in ")


def test_several_prompts_come_in_order_and_in_batches(folder, capsys, tmp_path):
    prompts = ["A", "some longer one", "été", "x\u2028y"]  # a line of a file ends with \\n alone
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts[1:]) + "\n\n", encoding="utf-8")
    code, out, err = run(
        capsys,
        *(folder, "--prompt", prompts[0], "--prompts-file", file, "--max-new-tokens", 12),
        *("--batch-size", 3, "--device", "cpu"),
    )
    assert code == 0, err
    texts = [expected_text(folder, prompt, 12) for prompt in prompts]
    assert out == "".join(text + "\n" for text in texts)
    assert "3 of 4 prompts\n4 of 4 prompts\n" in err


def test_several_prompts_stream_one_by_one(folder, capsys):
    options = ["--max-new-tokens", 9, "--device", "cpu", "--batch-size", 1, "--stream"]
    code, out, err = run(capsys, folder, "--prompt", "A", "--prompt", "x y", *options)
    assert code == 0, err
    assert out == "".join(expected_text(folder, prompt, 9) + "\n" for prompt in ("A", "x y"))


def test_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\nupon\n"))
    code, out, _ = run(capsys, folder, "--max-new-tokens", 9, "--device", "cpu")
    assert (code, out) == (0, expected_text(folder, "Once\nupon", 9) + "\n")


def test_options_reach_the_generation(folder, capsys):
    options = [folder, "--prompt", "abc", "--device", "cpu", "--max-new-tokens", 16]

    def text(*more):
        code, out, err = run(capsys, *options, *more)
        assert code == 0, err
        return out[:-1]

    greedy = text()
    drawn = text("--temperature", 0.8, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3)
    generator = torch.Generator().manual_seed(3)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    assert drawn == expected_text(folder, "abc", 16, generator=generator, **sampling) != greedy
    assert text("--temperature", 0) == greedy
    assert text("--draft", folder, "--lookahead", 3) == greedy
    assert text("--draft", "prompt_lookup") == greedy
    assert text("--repetition-penalty", 1.5) == expected_text(folder, "abc", 16, repetition_penalty=1.5)
    assert text("--top-k", 1, "--seed", 1) == greedy
    assert text("--dtype", "float32", "--no-cuda-graph") == greedy


def test_stop_ends_each_row(folder, capsys):
    free = [expected_text(folder, prompt, 16) for prompt in ("abc", "Q")]
    stop = next(letter for letter in free[0][2:] if letter.isascii() and letter.isprintable())
    code, out, err = run(
        capsys,
        *(folder, "--prompt", "abc", "--prompt", "Q", "--stop", stop, "--max-new-tokens", 16),
        *("--device", "cpu"),
    )
    assert code == 0, err
    cut = [text[: text.index(stop) + 1] if stop in text else text for text in free]
    assert out == "".join(text + "\n" for text in cut)


def test_a_row_ends_at_the_end_of_model_or_tokenizer(folder, tmp_path, capsys):
    """As chat models do whose config knows the end of a text, and their tokenizer that of a message."""
    model = load_pretrained(folder)
    ids = torch.tensor([tokenizer_of(folder)("abc")["input_ids"]])
    free = generate(model, ids, 20)[0, 3:].tolist()
    place, later = 4, next(token for token in free[10:] if token not in free[:10])
    assert free[place] not in free[:place]
    text = tokenizer_of(folder).decode(free[:place])
    for of_model, of_tokenizer in ((free[place], later), (later, free[place])):
        path = tmp_path / f"{of_model}"
        save_with_end(model, path, of_model)
        tokenizer = tokenizer_of(folder)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(of_tokenizer)
        tokenizer.save_pretrained(path)
        for stream in ("--stream", "--no-stream"):
            code, out, err = run(
                capsys, *(path, "--prompt", "abc", "--max-new-tokens", 20, stream, "--device", "cpu")
            )
            assert (code, out) == (0, text + "\n"), err


def save_with_end(model, path, end):
    again = GPTLMHeadModel(dataclasses.replace(model.config, eos_token_id=end))
    again.load_state_dict(model.state_dict())
    save_pretrained(again, path)


def test_ids_need_no_tokenizer(folder, tmp_path, capsys, monkeypatch):
    model = load_pretrained(folder)
    save_pretrained(model, tmp_path / "bare")
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(
        capsys,
        *(tmp_path / "bare", "--ids", "--prompt", "1, 2 3", "--max-new-tokens", 8, "--device", "cpu"),
    )
    assert code == 0, err
    expected = generate(model, torch.tensor([[1, 2, 3]]), 8)[0, 3:].tolist()
    assert [int(word) for word in out.split()] == expected


def test_chat_uses_the_template(folder, capsys):
    code, out, err = run(capsys, folder, "--chat", "--prompt", "hi", "--max-new-tokens", 9, "--device", "cpu")
    assert code == 0, err
    assert out == expected_text(folder, "[hi]", 9) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["MODEL", "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
        (["MODEL", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["MODEL", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: got 0; expected at least 1"),
        (["MODEL", "--prompt", "a", "--max-new-tokens", "999"], "input_ids: got a prompt of 1 tokens"),
        (["MODEL", "--prompt", " "], "prompt: got no text; expected at least one prompt"),
        (["MODEL", "--prompts-file", "nowhere.txt"], "--prompts-file: got nowhere.txt; expected a text file"),
        (["MODEL", "--prompt", "a", "--batch-size", "0"], "--batch-size: got 0"),
        (["MODEL", "--prompt", "a", "--device", "nothing"], "--device: got nothing; expected a device of"),
        (["MODEL", "--prompt", "a", "--seed", "1"], "--seed: got 1; expected to be left out where no tokens"),
        (["MODEL", "--prompt", "a", "--top-k", "5", "--temperature", "0"], "--top-k: got 5; expected to be"),
        (["MODEL", "--prompt", "a", "--top-p", "5"], "top_p: got 5.0; expected a probability"),
        (["MODEL", "--prompt", "a", "--cuda-graph"], "cuda_graph: got True with a model on cpu"),
        (["MODEL", "--prompt", "a", "--lookahead", "2"], "lookahead: got 2; expected to be left out without"),
        (["MODEL", "--prompt", "a", "--ids"], "prompt: got 'a'; expected token ids such as"),
        (["MODEL", "--prompt", ", ,", "--ids"], "prompt: got ', ,'; expected token ids such as"),
        (["MODEL", "--prompt", "1", "--ids", "--chat"], "--chat: got with --ids"),
        (
            ["MODEL", "--prompt", "a", "--prompt", "b", "--stream"],
            "--stream: got 2 prompts at a time; expected",
        ),
        (["MODEL", "--prompt", "1 999", "--ids"], "input_ids: got ids from 1 to 999"),
        (["./not-there", "--prompt", "1", "--ids"], "not-there"),
        (["./not-there", "--prompt", "a"], "tokenizer: got none that can be read from ./not-there"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folder, capsys, arguments, message):
    arguments = [str(folder) if argument == "MODEL" else argument for argument in arguments]
    if arguments and "--device" not in arguments:
        arguments += ["--device", "cpu"]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("flash-attn-generate: ")
    assert err.count("\n") == 1
    assert message in err


def test_without_transformers_the_error_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run(capsys, folder, "--prompt", "a", "--device", "cpu")
    assert code == 2
    assert "pip install 'flash-attn-models[transformers]', or pass token ids with --ids" in err


def test_help_names_every_option(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for option in ("--prompt", "--prompts-file", "--ids", "--chat", "--draft", "--stream", "--seed"):
        assert option in out


def test_as_a_process(folder):
    command = [sys.executable, "-c", "import sys; from flash_attn_models.cli import main; sys.exit(main())"]
    result = subprocess.run(
        [*command, str(folder), "--ids", "--max-new-tokens", "4", "--device", "cpu"],
        input="5 6 7",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 4


def test_growing_text_is_the_whole_text_and_never_half_a_character():
    class Bytes(IdCodec):
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "naïve → 漢字 end"
    growing = GrowingText(Bytes())
    pieces = [growing.add(byte) for byte in text.encode()]
    assert "".join(pieces) + growing.finish() == text
    assert "\ufffd" not in "".join(pieces)
    cut = GrowingText(Bytes())
    assert [cut.add(byte) for byte in "é".encode()[:1]] == [""]
    assert cut.finish() == "\ufffd"
