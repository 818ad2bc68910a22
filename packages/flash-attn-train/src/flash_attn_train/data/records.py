"""Rows of record files: JSONL (plain, .gz, .zst), Parquet, CSV and TSV."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from flash_attn_train.data.extras import require
from flash_attn_train.data.zstd import ZstdReader
from flash_attn_train.errors import DataError

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv", ".tsv")


def is_record_file(path: Path) -> bool:
    """Whether the name says that the file has rows."""
    return _lower_name(path).endswith(RECORD_SUFFIXES)


def read_records(path: Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The named fields of each row, in the file's order.

    CSV and TSV have a first line with the names of the fields, and their values are texts.

    Raises:
        DataError: the file cannot be read, is damaged, or has a row without one of the fields.
    """
    try:
        if _lower_name(path).endswith(".parquet"):
            yield from _parquet(path, fields)
        elif _lower_name(path).endswith((".csv", ".tsv")):
            yield from _table(path, fields)
        else:
            yield from _jsonl(path, fields)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        what = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {what}. Expected a whole {_kind(path)} file.") from error


def count_records(path: Path) -> int | None:
    """The number of rows where the file says it (Parquet); None elsewhere."""
    if not _lower_name(path).endswith(".parquet"):
        return None
    parquet = require("pyarrow.parquet", "data", "reads Parquet files")
    try:
        return int(parquet.read_metadata(path).num_rows)
    except Exception as error:
        raise DataError(f"cannot read {path}: {error}. Expected a whole Parquet file.") from error


def _kind(path: Path) -> str:
    return next(suffix for suffix in RECORD_SUFFIXES if _lower_name(path).endswith(suffix))


def _lower_name(path: Path) -> str:
    return path.name.lower()


# UTF-8 that may begin with a byte order mark, as text that was saved on Windows often does.
_ENCODING = "utf-8-sig"


def _open_text(path: Path) -> TextIO:
    if not _lower_name(path).endswith((".gz", ".zst")):
        return open(path, encoding=_ENCODING)
    if path.stat().st_size == 0:  # as a download leaves that never began; the libraries take it for no rows
        raise EOFError("it is empty")
    if _lower_name(path).endswith(".gz"):
        return gzip.open(path, "rt", encoding=_ENCODING)
    return io.TextIOWrapper(io.BufferedReader(ZstdReader(path), 1 << 20), encoding=_ENCODING)


def _jsonl(path: Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with _open_text(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    row = _object(line, place)
                    values = (_field(row, field, place) for field in fields)
                    # Only an escape can spell half a surrogate pair, which no encoding has.
                    yield tuple(map(_whole_text, values) if "\\u" in line else values)
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # a class of the optional library
                raise
            raise DataError(f"cannot read {path}: {error}. Expected a whole .zst file.") from error


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); expected one object per line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: got {type(row).__name__}, expected an object.")
    return row


def _table(path: Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    csv.field_size_limit(2**31 - 1)  # else 131,072 characters, and documents can be longer
    with open(path, encoding=_ENCODING, newline="") as lines:
        # Tab-separated corpora have no quoting: a quotation mark there is part of the text.
        tabs = _lower_name(path).endswith(".tsv")
        reader = (
            csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(lines)
        )
        for row in reader:
            yield tuple(_field(row, field, f"{path}, line {reader.line_num}") for field in fields)


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    parquet = require("pyarrow.parquet", "data", "reads Parquet files")
    arrow = require("pyarrow", "data", "reads Parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for field in fields:
                if field not in names:
                    raise DataError(_missing(field, names, str(path)))
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=list(dict.fromkeys(fields))):
                for values in zip(*(batch.column(field).to_pylist() for field in fields), strict=True):
                    row += 1
                    if None in values:
                        name = fields[values.index(None)]
                        raise DataError(f"{path}, row {row}: field {name!r} is null; expected a value.")
                    yield values
    except arrow.ArrowException as error:
        raise DataError(f"cannot read {path}: {error}. Expected a whole Parquet file.") from error


def _field(row: dict[str, Any], field: str, place: str) -> Any:
    value = row.get(field)
    if value is None:
        if field in row:
            raise DataError(f"{place}: field {field!r} is null; expected a value.")
        raise DataError(_missing(field, list(map(str, row)), place))
    return value


def _whole_text(value: Any) -> Any:
    """A text with U+FFFD for halves of surrogate pairs; other values as they are."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _missing(field: str, names: Sequence[str], place: str) -> str:
    return (
        f"{place}: no field {field!r}; it has {', '.join(names) or 'none'}. Set data.text_field (or "
        "data.label_field) to one of these."
    )
