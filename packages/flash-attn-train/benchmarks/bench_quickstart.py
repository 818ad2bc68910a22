"""The quickstart preset on a GPU: through the CUDA attention kernel, and through the portable path in fp32.

Runs differ in their seed (initial weights, order of batches) to show how far apart losses are by chance.

    python benchmarks/bench_quickstart.py [--json FILE] [--resume FILE]
    python benchmarks/bench_quickstart.py --smoke   # a tiny model on a CPU: shows that it runs, measures nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from flash_attn_train.cli import compose_config
from flash_attn_train.run import train
from result_file import ResultFile, Row, add_options

PRECISIONS = ("auto", "32-true")


def run(precision: str, seed: int, folder: Path, more: list[str]) -> Row:
    """One run of the preset, as a row."""
    overrides = [
        "preset=quickstart",
        f"seed={seed}",
        f"trainer.precision={precision}",
        f"output_dir={folder / f'{precision}-{seed}'}",
        f"data.cache_dir={folder / 'cache'}",
        *more,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser, "quickstart.json")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    arguments = parser.parse_args()
    more = ["trainer.max_steps=100"] if arguments.quick else []
    if arguments.smoke:
        more = ["mode=smoke", "trainer.accelerator=cpu", f"data.path={Path(json.__file__).parent}"]
    results = ResultFile.of_arguments("quickstart", arguments)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if arguments.quick or arguments.smoke else 3):
            for precision in PRECISIONS:
                case = {"precision": precision, "seed": seed}
                if results.rows_of(case):
                    continue
                with results.attempt(case):
                    results.put(case, [run(precision, seed, Path(folder), more)])
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
