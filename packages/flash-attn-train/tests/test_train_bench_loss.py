"""The benchmark of loss curves, with sizes at which it measures nothing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_models.attention import flash_attn_qkvpacked_func
from flash_attn_models.gpt import GPTLMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_loss
from bench_loss import CHANCE, KERNELS, REFERENCE, Size, attention_in, float32_attention, summary_rows


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
    monkeypatch.setattr(sys, "argv", ["bench_loss.py", "--smoke", "--json", str(path), *options])
    code = bench_loss.main()
    return code, json.loads(path.read_text())


def curves_of(result: dict[str, Any]) -> dict[str, list[float]]:
    curves: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["kind"] == "curve":
            curves.setdefault(row["run"], []).append(row["loss"])
    return curves


def test_three_runs_their_gaps_and_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "loss.json"
    code, result = run(monkeypatch, path, "--steps", "6", "--batch-size", "2")
    assert (code, result["failures"]) == (0, [])
    curves = curves_of(result)
    assert list(curves) == [KERNELS.name, REFERENCE.name, CHANCE.name]
    assert {len(curve) for curve in curves.values()} == {3}  # a record of two steps each
    assert [row["step"] for row in result["rows"] if row["run"] == CHANCE.name] == [2, 4, 6, None]
    assert all(0.0 < loss < 1.2 * math.log(512) for curve in curves.values() for loss in curve)
    summaries = {row["run"]: row for row in result["rows"] if row["kind"] == "summary"}
    for name, curve in curves.items():
        squares = [(a - b) ** 2 for a, b in zip(curve, curves[REFERENCE.name], strict=True)]
        assert summaries[name]["gap"] == pytest.approx(math.sqrt(sum(squares) / 3), abs=6e-6)
        assert summaries[name]["loss"] == curve[-1]
    # The same weights, batches and, on a CPU, the same path but for rounding; other weights are further away.
    assert summaries[KERNELS.name]["gap"] < 1e-3 < summaries[CHANCE.name]["gap"]
    assert [row["within_noise"] for row in summaries.values()] == [True, None, None]

    content = {**result, "rows": [row for row in result["rows"] if row["run"] != CHANCE.name]}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    _, resumed = run(monkeypatch, path, "--steps", "6", "--batch-size", "2", "--resume", str(path))
    assert curves_of(resumed) == curves
    assert f"curve  tiny  {KERNELS.name}" not in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["bench_loss.py", "--draw", str(path)])
    assert bench_loss.main() == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def rows_of(**curves: list[float]) -> list[dict[str, Any]]:
    names = {"kernels": KERNELS.name, "reference": REFERENCE.name, "chance": CHANCE.name}
    return [
        {"kind": "curve", "run": names[name], "step": step, "loss": loss}
        for name, losses in curves.items()
        for step, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(("kernels", "verdict"), [(2.3, True), (2.6, False), (1.5, False)])
def test_within_noise_is_no_further_than_other_weights(kernels: float, verdict: bool) -> None:
    rows = rows_of(kernels=[3.0, kernels], reference=[3.0, 2.0], chance=[3.0, 2.4])
    gaps = {row["run"]: (row["gap"], row["within_noise"]) for row in summary_rows(Size.smoke(), rows)}
    assert gaps == {
        KERNELS.name: (pytest.approx(abs(kernels - 2.0) / math.sqrt(2), abs=1e-5), verdict),
        REFERENCE.name: (0.0, None),
        CHANCE.name: (pytest.approx(0.4 / math.sqrt(2), abs=1e-5), None),
    }


def test_there_is_no_verdict_before_all_runs_are_done() -> None:
    alone = summary_rows(Size.smoke(), rows_of(kernels=[3.0, 2.0]))
    assert [(row["gap"], row["within_noise"]) for row in alone] == [(None, None)]
    two = summary_rows(Size.smoke(), rows_of(kernels=[3.0, 2.0], reference=[3.0, 2.0]))
    assert [(row["gap"], row["within_noise"]) for row in two] == [(0.0, None), (0.0, None)]


def test_the_model_is_gpt2_124m() -> None:
    with torch.device("meta"):
        model = GPTLMHeadModel(Size.full().config)
    assert sum(p.numel() for p in model.parameters()) == 124_475_904  # with a vocabulary in whole tiles
    assert model.config.dropout == model.config.attn_dropout == 0.0


def test_float32_attention_is_attention_and_the_model_takes_it() -> None:
    heads = torch.randn(2, 8, 6, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_heads_q": 2, "causal": True}
    torch.testing.assert_close(
        float32_attention(heads, **options), flash_attn_qkvpacked_func(heads, **options)
    )
    calls = []

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args[0].dtype)
        return float32_attention(*args, **options)

    config = Size.smoke().config
    model = GPTLMHeadModel(config)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with attention_in(counted), torch.autocast("cpu", torch.bfloat16):
        model.loss(tokens, tokens)
    assert calls == [torch.bfloat16] * config.n_layer


@pytest.mark.parametrize("options", [{"causal": False}, {"causal": True, "softcap": 20.0}])
def test_float32_attention_ignores_no_option(options: dict[str, Any]) -> None:
    heads = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match="plain GPT-2"):
        float32_attention(heads, num_heads_q=1, **options)
