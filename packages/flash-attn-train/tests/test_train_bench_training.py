"""The benchmark of training speed, with sizes at which it measures nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_models.gpt import GPTLMHeadModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_training
import training_contestants
from bench_training import SMOKE, Measured, Shape, config_of, rows_of
from training_contestants import MAKERS, OURS, OURS_COMPILED, THEIRS, THEIRS_MASKED, Contestant

STEPS = 3


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the program, with everything that is compiled left as it is."""
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--smoke", "--json", str(path), *options])
    with torch.compiler.set_stance("force_eager"):
        code = bench_training.main()
    return code, json.loads(path.read_text())


def test_it_measures_every_contestant_of_every_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code, result = run(monkeypatch, tmp_path / "training.json", "--steps", str(STEPS))
    assert (code, result["failures"], result["benchmark"]) == (0, [], "training")
    rows = result["rows"]
    assert [(row["model"], row["contestant"]) for row in rows] == [
        (shape.name, name) for shape in SMOKE for name in MAKERS
    ]
    for row in rows:
        peer = next(r for r in rows if (r["model"], r["contestant"]) == (row["model"], THEIRS))
        shape = next(shape for shape in SMOKE if shape.name == row["model"])
        assert row["tokens_per_step"] == shape.passes * shape.batch_size * shape.seqlen
        assert row["tokens_per_s"] > 0
        assert row["tokens_per_s"] == pytest.approx(row["tokens_per_step"] / row["step_ms"] * 1e3, rel=0.05)
        assert row["times_of_transformers"] == pytest.approx(
            row["tokens_per_s"] / peer["tokens_per_s"], abs=2e-3
        )
        assert row["fastest_ms"] <= row["step_ms"] <= row["slowest_ms"]
        assert row["peak_gib"] == 0.0  # of a CPU nothing is known


def test_figures_of_a_row() -> None:
    """GPT-2 124M by hand: 12 layers of 12 x 768 x 768 weights, a head of 50,304 tokens, heads that make 768."""
    shape = Shape("gpt2", 1024, 32)
    measured = {OURS: Measured([0.25, 0.2, 0.5], 2**33), THEIRS: Measured([0.4, 0.3, 0.5], 2**32)}
    ours, theirs = rows_of(shape, config_of(shape), measured)
    flops = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024
    assert ours["tokens_per_step"] == theirs["tokens_per_step"] == 2**17
    assert ours["tokens_per_s"] == 2**17 * 4
    assert ours["mfu"] == pytest.approx(2**17 * 4 * flops / 989.4e12, abs=5e-5)
    assert (ours["times_of_transformers"], theirs["times_of_transformers"]) == (1.6, 1.0)
    assert (ours["peak_gib"], ours["step_ms"], ours["fastest_ms"], ours["slowest_ms"]) == (8.0, 250, 200, 500)
    (alone,) = rows_of(shape, config_of(shape), {OURS: measured[OURS]})
    assert alone["times_of_transformers"] is None


@pytest.mark.parametrize("shape", bench_training.SHAPES, ids=str)
def test_every_shape_has_steps_of_the_same_length(shape: Shape) -> None:
    assert shape.tokens_per_step == bench_training.TOKENS_PER_STEP


@pytest.mark.parametrize("shape", bench_training.SHAPES, ids=str)
def test_every_shape_fits_into_80_gb(shape: Shape) -> None:
    """By the estimate that is beside the shapes, of the contestant that takes most."""
    config = config_of(shape)
    with torch.device("meta"):
        model = GPTLMHeadModel(config)
    tokens = shape.batch_size * shape.seqlen
    kept = 52 if shape.name.startswith("llama") else 36
    taken = 18 * sum(parameter.numel() for parameter in model.parameters())
    taken += tokens * config.n_layer * config.d_model * kept * 4 / 3
    taken += 4 * tokens * config.vocab_size
    assert taken < 65 * 2**30


def test_a_contestant_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hungry(config: Any, device: str) -> Contestant:
        contestant = MAKERS[OURS](config, device)

        def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("tried to allocate 90 GiB")

        contestant.loss = loss
        return contestant

    monkeypatch.setitem(training_contestants.MAKERS, OURS_COMPILED, hungry)
    options = ["--shapes", "gpt2", "--steps", "1", "--contestants", OURS, OURS_COMPILED]
    code, result = run(monkeypatch, tmp_path / "training.json", *options)
    assert code == 1
    (failure,) = result["failures"]
    assert failure["case"] == {"model": "gpt2", "seqlen": 64, "batch_size": 2, "contestant": OURS_COMPILED}
    assert "90 GiB" in failure["message"]
    assert [row["contestant"] for row in result["rows"]] == [OURS]


def test_resuming_measures_only_shapes_that_lack_a_contestant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "training.json"
    options = ["--steps", "1", "--contestants", OURS]
    _, before = run(monkeypatch, path, *options)
    content = {**before, "rows": before["rows"][:1]}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    _, after = run(monkeypatch, path, *options, "--resume", str(path))
    assert after["rows"][0] == before["rows"][0]
    assert [row["model"] for row in after["rows"]] == [shape.name for shape in SMOKE]
    assert "gpt2@64" not in capsys.readouterr().out


def test_sequences_of_a_pass_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--shapes", "gpt2", "--steps", "1", "--contestants", OURS, "--batch-size", "3"]
    _, result = run(monkeypatch, tmp_path / "training.json", *options)
    assert [row["batch_size"] for row in result["rows"]] == [3]


def test_an_unknown_shape_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--shapes", "gpt2-xxl"])
    with pytest.raises(SystemExit):
        bench_training.main()
    assert "gpt2-xxl" in capsys.readouterr().err


def test_a_parked_contestant_takes_no_memory_and_trains_on_as_if_it_had_not_waited() -> None:
    shape = SMOKE[0]
    config = config_of(shape)
    batches = [tuple(torch.randint(config.vocab_size, (2, 2, shape.seqlen))) for _ in range(3)]
    trained = []
    for parks in (False, True):
        torch.manual_seed(0)
        contestant = MAKERS[OURS](config, "cpu")
        parameters = list(contestant.model.parameters())
        for batch in batches:
            contestant.step([(batch[0], batch[1])])
            assert all(parameter.grad is None for parameter in parameters)
            if parks:
                resting = contestant.resting_bytes()
                contestant.park()
                assert contestant.resting_bytes() == resting
                states = [t for state in contestant.optimizer.state.values() for t in state.values()]
                assert {t.untyped_storage().nbytes() for t in (*parameters, *states)} == {0}
                contestant.wake()
        assert all(a is b for a, b in zip(parameters, contestant.model.parameters(), strict=True))
        trained.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    assert torch.equal(*trained)


@pytest.mark.parametrize("shape", SMOKE, ids=str)
def test_the_peer_is_compiled_whole_and_its_attention_has_no_mask(
    monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    """With a mask, SDPA could not take its flash kernel."""
    pytest.importorskip("transformers")
    attention: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        attention.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot" in str(node.target))
        return graph.forward

    graphs: list[torch.fx.GraphModule] = []
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=backend))
    torch._dynamo.reset()
    config = config_of(shape)
    contestant = MAKERS[THEIRS](config, "cpu")
    tokens = torch.randint(config.vocab_size, (2, 16))
    contestant.loss(tokens, tokens)
    assert len(graphs) == 1
    assert [(options["attn_mask"], options["is_causal"]) for options in attention] == [(None, True)]
    logits = contestant.model(tokens).logits
    changed = tokens.clone()
    changed[:, -1] += 1
    after = contestant.model(changed % config.vocab_size).logits
    torch.testing.assert_close(logits[:, :-1], after[:, :-1])  # nothing sees what is to come


@pytest.mark.parametrize("shape", SMOKE, ids=str)
def test_the_peer_computes_the_same_without_its_mask(shape: Shape) -> None:
    pytest.importorskip("transformers")
    config = config_of(shape)
    with torch.compiler.set_stance("force_eager"):
        plain, masked = (MAKERS[name](config, "cpu") for name in (THEIRS, THEIRS_MASKED))
        masked.model.load_state_dict(plain.model.state_dict())
        tokens = torch.randint(config.vocab_size, (2, 16))
        torch.testing.assert_close(plain.loss(tokens, tokens), masked.loss(tokens, tokens))
