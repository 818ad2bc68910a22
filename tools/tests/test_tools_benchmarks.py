from __future__ import annotations

import json
from pathlib import Path

import benchmark_plot
import pytest
import render_benchmarks
from benchmark_results import ResultError, read_result
from benchmark_view import parse_view, table
from repository import packages

RESULT = {
    "benchmark": "speed",
    "gpu": "Some GPU",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.11.0"},
    "ceilings": {"gemm_tflops": 700.123, "copy_gbps": 3000.5},
    "rows": [
        {"seqlen": 1024, "causal": True, "ours_tflops": 123.456, "peer_tflops": None},
        {"seqlen": 4096, "causal": False, "ours_tflops": 9.8765, "peer_tflops": 1.0},
    ],
}
TEXT = "# Title\n\n<!-- benchmark:speed -->\nold figures\n<!-- /benchmark -->\nend\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("root\n")
    for package in packages(tmp_path):
        package.folder.mkdir(parents=True)
        (package.folder / "README.md").write_text(TEXT if package.layer == "ops" else "nothing\n")
    write_result(tmp_path, RESULT)
    return tmp_path


def write_result(root: Path, result: dict, name: str = "speed") -> Path:
    path = packages(root)[1].folder / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


def render(root: Path, *, write: bool) -> list[str]:
    return render_benchmarks.render(root, render_benchmarks.read_results(root), write=write)


def rendered(root: Path, block: str) -> str:
    readme = packages(root)[1].folder / "README.md"
    readme.write_text(f"<!-- benchmark:speed {block} -->\n<!-- /benchmark -->\n")
    assert render(root, write=True) == []
    assert render(root, write=False) == []
    return readme.read_text()


def test_figures_appear_with_where_they_come_from(repository: Path) -> None:
    assert render(repository, write=True) == []
    text = (packages(repository)[1].folder / "README.md").read_text()
    assert "old figures" not in text
    assert text.startswith("# Title\n") and text.endswith("<!-- /benchmark -->\nend\n")
    assert "Measured 2026-01-02 on Some GPU (torch 2.11.0)." in text
    assert "700 TFLOP/s" in text
    assert "| 1024 | yes | 123 | – |" in text
    assert "| 4096 | no | 9.88 | 1 |" in text


def test_check_passes_after_rendering_and_fails_after_a_new_measurement(repository: Path) -> None:
    assert any("differs from the results" in problem for problem in render(repository, write=False))
    render(repository, write=True)
    assert render(repository, write=False) == []
    changed = json.loads(json.dumps(RESULT))
    changed["rows"][0]["ours_tflops"] = 200.0
    write_result(repository, changed)
    assert any("differs from the results" in problem for problem in render(repository, write=False))


def test_a_result_that_no_readme_shows_is_found(repository: Path) -> None:
    write_result(repository, {**RESULT, "benchmark": "other"}, "other")
    assert any("results/other.json is shown in no README" in line for line in render(repository, write=False))


def test_a_block_without_a_result_holds_no_figures(repository: Path) -> None:
    readme = packages(repository)[0].folder / "README.md"
    readme.write_text(TEXT.replace("speed", "missing"))
    assert any(f"{readme}: differs" in problem for problem in render(repository, write=False))
    render(repository, write=True)
    assert "-->\nNot measured yet.\n<!-- /benchmark -->" in readme.read_text()


def test_an_open_block_is_found(repository: Path) -> None:
    (packages(repository)[0].folder / "README.md").write_text("<!-- benchmark:speed -->\n")
    assert any("is not closed" in problem for problem in render(repository, write=False))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": []}, "rows: expected at least one"),
        ({"rows": [{"a": 1}, {"b": 1}]}, "same columns"),
        ({"ceilings": {}}, "ceilings: got {}"),
        ({"gpu": 3}, "gpu: got 3"),
        ({"date": None}, "date: got None"),
    ],
)
def test_a_malformed_result_is_refused_by_name(repository: Path, change: dict, complaint: str) -> None:
    path = write_result(repository, {**RESULT, **change})
    with pytest.raises(ResultError, match=r"speed\.json") as caught:
        read_result(path)
    assert complaint in str(caught.value)


LONG = [
    {"direction": direction, "seqlen": seqlen, "contestant": who, "tflops": speed, "share": speed / 700}
    for direction, seqlen, who, speed in [
        ("forward", 1024, "ours", 350.0),
        ("forward", 1024, "peer", 175.0),
        ("forward", 4096, "ours", 400.0),
        ("backward", 1024, "ours", 300.0),
    ]
]


def test_cross_table(repository: Path) -> None:
    write_result(repository, {**RESULT, "rows": LONG})
    text = rendered(
        repository, "rows=seqlen columns=contestant value=tflops share=share where=direction:forward"
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| seqlen | ours | peer |",
        "| ---: | ---: | ---: |",
        "| 1024 | 350 (50%) | 175 (25%) |",
        "| 4096 | 400 (57%) | – |",
    ]


def test_plot_of_a_cross_table(repository: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_result(repository, {**RESULT, "rows": LONG})
    text = rendered(repository, "rows=direction,seqlen columns=contestant value=tflops plot=speed.png")
    picture = path.with_name("speed.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "![tflops of speed](benchmarks/results/speed.png)" in text
    picture.unlink()
    assert any("speed.png is missing" in problem for problem in render(repository, write=False))


def test_cross_table_against_the_best_of_several(repository: Path) -> None:
    rows = [
        {"seqlen": seqlen, "direction": direction, "contestant": who, "tflops": speed}
        for seqlen, direction, who, speed in [
            (1024, "forward", "ours", 300.0),
            (1024, "forward", "slow", 100.0),
            (1024, "forward", "fast", 400.0),
            (1024, "backward", "fast", 999.0),  # of another case
            (4096, "forward", "ours", 300.0),
            (4096, "forward", "slow", 200.0),
            (4096, "forward", "fast", None),
            (16384, "forward", "ours", 300.0),
        ]
    ]
    write_result(repository, {**RESULT, "rows": rows})
    against = "value=tflops against=contestant:slow,fast"
    text = rendered(
        repository, f"rows=direction columns=seqlen {against} where=direction:forward,contestant:ours"
    )
    assert "| direction | 1024 | 4096 | 16384 |" in text
    assert "| forward | 300 (0.75×) | 300 (1.50×) | 300 |" in text
    text = rendered(repository, f"rows=seqlen columns=contestant {against} where=direction:forward")
    assert "| 1024 | 300 (0.75×) | 100 (0.25×) | 400 (1.00×) |" in text


@pytest.mark.parametrize("where", ["direction:sideways", "scope:all"])
def test_a_block_whose_rows_are_not_measured_says_so(repository: Path, where: str) -> None:
    path = write_result(repository, {**RESULT, "rows": LONG})
    text = rendered(repository, f"rows=direction columns=seqlen value=tflops where={where} plot=speed.png")
    assert "-->\nNot measured yet.\n<!--" in text
    assert not path.with_name("speed.png").exists()


def test_line_plot_stands_in_place_of_the_table(repository: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_result(repository, {**RESULT, "rows": LONG})
    text = rendered(repository, "rows=direction x=seqlen columns=contestant value=tflops plot=lines.png")
    assert path.with_name("lines.png").read_bytes().startswith(b"\x89PNG")
    assert "Measured 2026-01-02" in text
    assert "![tflops over seqlen of speed](benchmarks/results/lines.png)" in text
    assert "|" not in text


def test_panels_of_a_line_plot(repository: Path) -> None:
    """One for each case, with a line for each contestant and the run's ceiling; one legend and one scale."""
    pytest.importorskip("matplotlib")
    rows = [
        {"head_dim": head_dim, "causal": causal, "seqlen": seqlen, "contestant": who, "tflops": speed}
        for head_dim in (64, 128)
        for causal in (False, True)
        for seqlen in (512, 2048)
        for who, speed in (("ours", 2.0 * head_dim + causal), ("cudnn", None if causal else 50.0))
    ]
    result = read_result(write_result(repository, {**RESULT, "rows": rows}))
    view = parse_view("rows=head_dim,causal x=seqlen columns=contestant value=tflops plot=lines.png")
    content = table(result, view)
    assert content is not None
    figure = benchmark_plot.line_figure(result, content, view)
    full64, full128, causal64, causal128 = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["head dim 64", "head dim 128", "", ""]
    assert full64.get_ylabel() == "not causal\nTFLOP/s"
    assert causal64.get_ylabel() == "causal\nTFLOP/s"
    ours, cudnn, ceiling = causal128.get_lines()
    assert list(ours.get_xdata()) == [512, 2048]
    assert list(ours.get_ydata()) == [257.0, 257.0]
    assert list(cudnn.get_ydata()) == []  # not measured
    assert list(ceiling.get_ydata()) == [700.123, 700.123]
    assert [text.get_text() for text in causal64.get_xticklabels()] == ["512", "2k"]
    assert full64.get_ylim() == full128.get_ylim()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["ours", "cudnn"]


def test_contestants_are_told_apart_and_keep_their_looks() -> None:
    alone, beside = (benchmark_plot.styles_of(names) for names in (["cudnn"], ["ours", "a", "b", "cudnn"]))
    assert alone["cudnn"] == beside["cudnn"]
    assert len(set(beside.values())) == 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("row=seqlen", "got 'row=seqlen', expected one of rows"),
        ("rows=seqlen value=tflops", "expected rows, columns and value together"),
        ("rows=nothing columns=contestant value=tflops", "got column 'nothing'"),
        ("rows=seqlen columns=contestant value=tflops", "two rows for"),
        ("where=direction", "where: got 'direction', expected column:value"),
        ("share=share", "expected rows, columns and value together"),
        ("rows=seqlen columns=contestant value=tflops against=peer", "against: got 'peer'"),
        ("rows=seqlen columns=contestant value=tflops against=nothing:peer", "got column 'nothing'"),
        ("rows=seqlen columns=contestant value=tflops share=share against=a:b", "one of share and against"),
        ("rows=direction columns=contestant value=tflops x=seqlen", "expected plot together with x"),
    ],
)
def test_wrong_block_options_are_refused(repository: Path, options: str, complaint: str) -> None:
    write_result(repository, {**RESULT, "rows": LONG})
    with pytest.raises(ResultError) as caught:
        rendered(repository, options)
    assert complaint in str(caught.value)
