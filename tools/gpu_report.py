"""Reproduces every GPU figure of the project: all GPU tests, then all benchmarks, on this machine's GPU.

    python tools/gpu_report.py [--only tests|benchmarks] [--package kernels] [-k EXPRESSION] [--quick]

Needs torch, triton and pytest; the packages are used from the checkout. Compiles the CUDA library if it is
missing (--build: if anything changed), fetching what the compiler lacks. Writes into --out: report.json (GPU,
versions, date, what ran and how it ended), a JUnit file and a log per package, a JSON and a log per
benchmark. --save also puts the benchmarks' JSON where the READMEs are rendered from. The exit code is 0 only
if everything that ran passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmark_results import ResultError, read_result
from kernels_build import LIBRARY
from repository import LAYERS, ROOT, Package, packages

# Prints what the figures depend on; run with the packages importable, on the GPU.
MACHINE = """
import datetime, json, platform, torch, triton
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": properties.name,
    "compute_capability": f"{properties.major}.{properties.minor}",
    "memory_gib": round(properties.total_memory / 2**30, 1),
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                 "triton": triton.__version__},
}))
"""
CEILINGS = """
import json
from flash_attn_kernels.testing import measure_ceilings
print(json.dumps(measure_ceilings()))
"""


@dataclass(frozen=True)
class Outcome:
    """One process of the report."""

    kind: str  # tests or benchmark
    name: str
    status: str  # ok, failed, timed out, unavailable
    seconds: float
    detail: str


def main() -> int:
    arguments = parse_arguments()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sources = [str(package.source) for package in packages()]
    inherited = os.environ.get("PYTHONPATH")
    search_path = os.pathsep.join([*sources, inherited] if inherited else sources)
    environment = dict(os.environ, PYTHONPATH=search_path)

    machine = run_python(MACHINE, environment)
    if machine is None:
        print("error: no CUDA GPU that torch can use, or torch or triton is missing", file=sys.stderr)
        return 2
    if (arguments.build or not LIBRARY.is_file()) and not build_library(out, arguments.timeout):
        return 2
    machine["library_sha256"] = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    machine["ceilings"] = run_python(CEILINGS, environment)
    print(json.dumps(machine, indent=1), flush=True)

    chosen = [Package(layer) for layer in arguments.package or LAYERS]
    outcomes = []
    if arguments.only != "benchmarks":
        for package in chosen:
            outcomes.append(run_tests(package, out, environment, arguments))
            print(line(outcomes[-1]), flush=True)
    if arguments.only != "tests":
        for package in chosen:
            for script in sorted(package.folder.glob("benchmarks/bench_*.py")):
                if arguments.keyword and arguments.keyword not in script.stem:
                    continue
                outcomes.append(run_benchmark(package, script, out, environment, arguments))
                print(line(outcomes[-1]), flush=True)

    report = {**machine, "outcomes": [asdict(outcome) for outcome in outcomes]}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(["", f"{machine['gpu']}: {out / 'report.json'}", *map(line, outcomes)]))
    failures = [outcome for outcome in outcomes if outcome.status in ("failed", "timed out")]
    if not outcomes:
        print("error: nothing ran: no test or benchmark fits the filters", file=sys.stderr)
    return 1 if failures or not outcomes else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("tests", "benchmarks"))
    parser.add_argument("--package", action="append", choices=LAYERS, help="may be given several times")
    parser.add_argument("-k", dest="keyword", help="pytest's -k for tests; part of the name for benchmarks")
    parser.add_argument(
        "--build", action="store_true", help="compile what changed since the library was built"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats in the benchmarks")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process (default 1800)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-report", help="folder (default gpu-report)")
    parser.add_argument(
        "--save", action="store_true", help="keep the results in packages/*/benchmarks/results"
    )
    arguments = parser.parse_args()
    if arguments.save and arguments.quick:
        parser.error("--save keeps published figures, which --quick does not give: drop one of them")
    return arguments


def build_library(out: Path, timeout: float) -> bool:
    build = [sys.executable, str(ROOT / "tools" / "build_ext.py"), "--fetch"]
    log = out / "build.log"
    status, seconds = run_logged(build, dict(os.environ), log, timeout)
    print(f"library: {status} ({seconds:.0f} s)", flush=True)
    if status != "ok":
        print(log.read_text()[-3000:], file=sys.stderr)
    return status == "ok"


def missing_requirement(package: Package, environment: dict[str, str]) -> str | None:
    """Why the package cannot run here, if so: its self-test module imports all that it needs."""
    probe = subprocess.run(
        [sys.executable, "-c", f"import {package.module}.__main__"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return probe.stderr.strip().splitlines()[-1] if probe.returncode != 0 else None


def run_tests(
    package: Package, out: Path, environment: dict[str, str], arguments: argparse.Namespace
) -> Outcome:
    missing = missing_requirement(package, environment)
    if missing is not None:
        return Outcome("tests", package.layer, "unavailable", 0.0, missing)
    junit = out / f"tests-{package.layer}.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(package.folder / "tests"), "-m", "gpu", "-q", "-ra"]
    command += ["-p", "no:cacheprovider", f"--junitxml={junit}"]
    command += ["-k", arguments.keyword] if arguments.keyword else []
    status, seconds = run_logged(command, environment, out / f"tests-{package.layer}.log", arguments.timeout)
    if not junit.is_file():
        return Outcome("tests", package.layer, status, seconds, f"see tests-{package.layer}.log")
    counts = junit_counts(junit)
    if counts["tests"] == 0 and counts["errors"] == 0:
        return Outcome("tests", package.layer, "ok", seconds, "no GPU tests")  # pytest's exit code is 5
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    detail = f"{passed} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
    return Outcome("tests", package.layer, status, seconds, detail)


def run_benchmark(
    package: Package, script: Path, out: Path, environment: dict[str, str], arguments: argparse.Namespace
) -> Outcome:
    name = script.stem.removeprefix("bench_")
    missing = missing_requirement(package, environment)
    if missing is not None:
        return Outcome("benchmark", name, "unavailable", 0.0, missing)
    result = out / f"{package.layer}-{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--json", str(result)] + ["--quick"] * arguments.quick
    log = result.with_suffix(".log")
    status, seconds = run_logged(command, environment, log, arguments.timeout)
    if status != "ok":
        return Outcome("benchmark", name, status, seconds, f"see {log.name}")
    try:
        rows = len(read_result(result).rows)
    except ResultError as error:
        return Outcome("benchmark", name, "failed", seconds, str(error))
    if arguments.save:
        results = script.parent / "results"
        results.mkdir(exist_ok=True)
        shutil.copyfile(result, results / f"{name}.json")
    return Outcome("benchmark", name, "ok", seconds, f"{rows} rows in {result.name}")


def run_logged(
    command: list[str], environment: dict[str, str], log: Path, timeout: float
) -> tuple[str, float]:
    """(ok, failed or timed out; seconds); everything that the process printed is in `log`."""
    start = time.monotonic()
    with log.open("w") as file:
        try:
            finished = subprocess.run(
                command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=timeout
            )
            status = "ok" if finished.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
    return status, round(time.monotonic() - start, 1)


def run_python(program: str, environment: dict[str, str]) -> dict | None:
    """The JSON that a short program prints; None when it fails, with its traceback shown."""
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        print(finished.stderr.strip()[-1500:], file=sys.stderr)
        return None
    return json.loads(finished.stdout)


def junit_counts(junit: Path) -> dict[str, int]:
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def line(outcome: Outcome) -> str:
    what = f"{outcome.kind} {outcome.name}"
    return f"{outcome.status:12} {what:32} {outcome.seconds:8.1f} s  {outcome.detail}"


if __name__ == "__main__":
    sys.exit(main())
