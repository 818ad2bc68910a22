"""The JSON that a benchmark writes, checked.

    {"benchmark": name, "gpu": name, "date": ISO date, "versions": {"torch": ...},
     "ceilings": {"gemm_tflops": number, "copy_gbps": number}, "rows": [{column: value, ...}, ...]}

`ceilings` were measured in the same run; a result without a GPU (a build time) has null for gpu and no
ceilings.
Rows share their columns; a value is a number, a string, a boolean or null (not measured).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ResultError(ValueError):
    """A result file that does not hold what it should; the message names file and field."""


@dataclass(frozen=True)
class Result:
    benchmark: str
    gpu: str | None
    date: str
    versions: dict[str, str | None]
    ceilings: dict[str, float]
    rows: list[dict[str, Any]]

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


FIELD_TYPES = {"benchmark": str, "date": str, "versions": dict, "ceilings": dict, "rows": list}


def read_result(path: Path) -> Result:
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ResultError(f"{path}: got {type(data).__name__}, expected an object")
    for field, expected in FIELD_TYPES.items():
        if not isinstance(data.get(field), expected):
            raise ResultError(f"{path}: {field}: got {data.get(field)!r}, expected {expected.__name__}")
    gpu = data.get("gpu")
    if gpu is not None and not isinstance(gpu, str):
        raise ResultError(f"{path}: gpu: got {gpu!r}, expected a name or null")
    if gpu is not None and not {"gemm_tflops", "copy_gbps"} <= set(data["ceilings"]):
        raise ResultError(f"{path}: ceilings: got {data['ceilings']}, expected gemm_tflops and copy_gbps")
    rows = data["rows"]
    if not rows or any(not isinstance(row, dict) or list(row) != list(rows[0]) for row in rows):
        raise ResultError(f"{path}: rows: expected at least one, all with the same columns in the same order")
    return Result(
        benchmark=data["benchmark"],
        gpu=gpu,
        date=data["date"],
        versions=data["versions"],
        ceilings=data["ceilings"],
        rows=rows,
    )
