"""The quickstart preset on a GPU: through the CUDA attention kernel, and through the portable path in fp32.

Runs differ in their seed (initial weights, order of batches) to show how far apart losses are by chance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from flash_attn_models.testing import measure_ceilings, write_result
from flash_attn_train.cli import compose_config
from flash_attn_train.run import train

PRECISIONS = ("auto", "32-true")


def run(precision: str, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """One run of the preset, as a row."""
    overrides = [
        "preset=quickstart",
        f"seed={seed}",
        f"trainer.precision={precision}",
        f"output_dir={folder / f'{precision}-{seed}'}",
        f"data.cache_dir={folder / 'cache'}",
        *(["trainer.max_steps=100"] if quick else []),
    ]
    result = train(compose_config(overrides))
    session = json.loads((result.folder / "manifest.json").read_text())["sessions"][-1]
    return {
        "attention": session["attention"].split(" (")[0],
        "precision": precision,
        "seed": seed,
        "first_val_loss": round(result.first_val_loss, 4),
        "last_val_loss": round(result.last_val_loss, 4),
        "tokens": result.tokens,
        "tokens_per_s": round(result.tokens / result.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="quickstart.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    arguments = parser.parse_args()
    ceilings = measure_ceilings()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            run(precision, seed, Path(folder), arguments.quick)
            for seed in range(1 if arguments.quick else 3)
            for precision in PRECISIONS
        ]
    write_result(arguments.json, "quickstart", rows, ceilings)


if __name__ == "__main__":
    main()
