from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
from repository import ROOT, Package

RESULT = (
    '{"benchmark": "x", "gpu": "G", "date": "2026-01-01", "versions": {}, '
    '"ceilings": {"gemm_tflops": 1.0, "copy_gbps": 1.0}, "rows": [{"a": 1}]}'
)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package called flash_attn_ops with nothing in it yet."""
    package = Package("ops", tmp_path)
    package.init_file.parent.mkdir(parents=True)
    package.init_file.write_text("")
    package.init_file.with_name("__main__.py").write_text("")
    (package.folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    for folder in ("tests", "benchmarks"):
        (package.folder / folder).mkdir()
    return package


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"keyword": None, "quick": False, "save": False, "timeout": 60.0, **changes})


def environment(package: Package) -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(package.source))


def benchmark(package: Package, program: str, tmp_path: Path, **changes: object) -> gpu_report.Outcome:
    script = package.folder / "benchmarks" / "bench_x.py"
    script.write_text(f"import sys, pathlib\nout = pathlib.Path(sys.argv[2])\n{program}\n")
    return gpu_report.run_benchmark(package, script, tmp_path, environment(package), options(**changes))


def test_a_good_benchmark_is_kept_when_asked(package: Package, tmp_path: Path) -> None:
    program = f"assert sys.argv[1] == '--json'; out.write_text('''{RESULT}''')"
    outcome = benchmark(package, program, tmp_path)
    assert (outcome.status, outcome.detail) == ("ok", "1 rows in ops-x.json")
    results = package.folder / "benchmarks" / "results"
    assert not results.exists()
    assert benchmark(package, program, tmp_path, save=True).status == "ok"
    assert (results / "x.json").read_text() == RESULT


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("raise SystemExit(3)", "failed", "see ops-x.log"),
        ("out.write_text('{}')", "failed", "benchmark: got None"),
        ("pass", "failed", "No such file"),
    ],
)
def test_a_bad_benchmark_fails_and_keeps_nothing(
    package: Package, tmp_path: Path, program: str, status: str, detail: str
) -> None:
    outcome = benchmark(package, program, tmp_path, save=True)
    assert outcome.status == status
    assert detail in outcome.detail
    assert not (package.folder / "benchmarks" / "results").exists()


def test_a_benchmark_that_hangs_is_stopped(package: Package, tmp_path: Path) -> None:
    assert benchmark(package, "import time; time.sleep(60)", tmp_path, timeout=1.0).status == "timed out"


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        (
            "@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert False",
            "ok",
            "1 passed, 0 failed, 0 skipped",
        ),
        ("@pytest.mark.gpu\ndef test_a(): assert False", "failed", "0 passed, 1 failed, 0 skipped"),
        ("@pytest.mark.gpu\ndef test_a(): pytest.skip('x')", "ok", "0 passed, 0 failed, 1 skipped"),
        ("import missing_thing", "failed", "0 passed, 1 failed, 0 skipped"),
        ("def test_a(): pass", "ok", "no GPU tests"),
    ],
)
def test_gpu_tests_are_counted(
    package: Package, tmp_path: Path, source: str, status: str, detail: str
) -> None:
    (package.folder / "tests" / "test_x.py").write_text(f"import pytest\n{source}\n")
    outcome = gpu_report.run_tests(package, tmp_path, environment(package), options())
    assert (outcome.status, outcome.detail) == (status, detail)


def test_a_package_that_cannot_be_imported_is_reported(package: Package, tmp_path: Path) -> None:
    package.init_file.write_text("import a_missing_requirement")
    outcome = gpu_report.run_tests(package, tmp_path, environment(package), options())
    assert outcome.status == "unavailable"
    assert "a_missing_requirement" in outcome.detail


def test_without_a_gpu_nothing_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_report.py"), "--out", str(tmp_path / "out")]
    without = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    finished = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "no CUDA GPU" in finished.stderr
    assert not (tmp_path / "out" / "report.json").exists()
