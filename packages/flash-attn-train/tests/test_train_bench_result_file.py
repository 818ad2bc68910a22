"""The result of a benchmark of training grows case by case, keeps failures, and can be continued."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from result_file import ResultFile


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def row(model: str, speed: float) -> dict[str, Any]:
    return {"model": model, "speed": speed}


def test_every_case_is_written_at_once_in_place_of_its_earlier_rows(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    results = ResultFile(path, "speed", on_gpu=False)
    results.put({"model": "a"}, [row("a", 1.0)])
    assert read(path)["rows"] == [row("a", 1.0)]
    results.put({"model": "b"}, [row("b", 2.0)])
    results.put({"model": "a"}, [row("a", 3.0), row("a", 4.0)])
    assert read(path)["rows"] == [row("b", 2.0), row("a", 3.0), row("a", 4.0)]
    assert (read(path)["benchmark"], read(path)["gpu"], read(path)["ceilings"]) == ("speed", None, {})
    assert list(tmp_path.iterdir()) == [path]  # nothing half written stays


def test_a_case_that_fails_is_kept_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    results = ResultFile(path, "speed", on_gpu=False)
    assert results.exit_code == 0
    with results.attempt({"model": "a"}):
        raise MemoryError("80 GiB are not enough")
    with results.attempt({"model": "b"}):
        results.put({"model": "b"}, [row("b", 2.0)])
    assert results.exit_code == 1
    assert read(path)["failures"] == [
        {"case": {"model": "a"}, "message": "MemoryError: 80 GiB are not enough"}
    ]
    assert read(path)["rows"] == [row("b", 2.0)]


def test_a_failure_holds_nothing_of_what_failed(tmp_path: Path) -> None:
    """The frames of an error would keep a model on the GPU."""
    error = RuntimeError("out of memory")
    results = ResultFile(tmp_path / "speed.json", "speed", on_gpu=False)
    with results.attempt({}):
        raise error from ValueError("inner")
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "speed.json", "speed", on_gpu=False)
    with pytest.raises(KeyboardInterrupt), results.attempt({}):
        raise KeyboardInterrupt


def test_a_resumed_result_has_the_rows_of_before_and_says_when_it_went_on(tmp_path: Path) -> None:
    first = ResultFile(tmp_path / "first.json", "speed", on_gpu=False)
    first.put({"model": "a"}, [row("a", 1.0)])
    with first.attempt({"model": "b"}):
        raise MemoryError
    second = ResultFile(tmp_path / "second.json", "speed", on_gpu=False, resume=first.path)
    assert second.rows_of({"model": "a"}) == [row("a", 1.0)]
    assert second.exit_code == 0  # what failed is tried again
    assert read(second.path)["rows"] == [row("a", 1.0)]  # also if nothing comes after it
    second.put({"model": "b"}, [{"model": "b", "new": True, "speed": 2.0}])
    content = read(second.path)
    assert content["rows"] == [
        {"model": "a", "new": None, "speed": 1.0},
        {"model": "b", "new": True, "speed": 2.0},
    ]
    assert list(content["rows"][0]) == list(content["rows"][1])
    assert [set(session) for session in content["resumed"]] == [{"date", "ceilings"}]
    assert content["date"] == read(first.path)["date"]


@pytest.mark.parametrize(
    ("field", "value"), [("benchmark", "other"), ("gpu", "Some GPU"), ("versions", {"torch": "1.0"})]
)
def test_a_result_that_does_not_go_with_this_run_is_not_resumed(
    tmp_path: Path, field: str, value: Any
) -> None:
    first = ResultFile(tmp_path / "first.json", "speed", on_gpu=False)
    first.put({}, [row("a", 1.0)])
    (tmp_path / "changed.json").write_text(json.dumps({**read(first.path), field: value}))
    with pytest.raises(ValueError, match=f"with {field} .*expected"):
        ResultFile(tmp_path / "second.json", "speed", on_gpu=False, resume=tmp_path / "changed.json")
