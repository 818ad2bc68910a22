"""Self-test: ``python -m flash_attn_train`` trains a tiny model in a temporary folder.

The exit code is 0, or 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from flash_attn_train.configs import (
    AdamWConfig,
    CheckpointConfig,
    GenerationConfig,
    GPTModelConfig,
    LoggerConfig,
    TextDataConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
)
from flash_attn_train.run import train
from flash_attn_train.summary import RunResult


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=f"{folder}/run",
            data=TextDataConfig(
                path=str(Path(json.__file__).parent), suffixes=[".py"], cache_dir=f"{folder}/cache"
            ),
            tokenizer=TokenizerConfig(vocab_size=320),
            model=GPTModelConfig(max_seqlen=32, n_layer=2, n_head=1, d_model=64),
            optimizer=AdamWConfig(lr=1e-2),
            trainer=TrainerConfig(max_steps=40, batch_size=8, val_every_n_steps=20, val_sequences=32),
            logger=LoggerConfig(tensorboard=False),
            checkpoint=CheckpointConfig(every_n_steps=20),
            generation=GenerationConfig(max_new_tokens=8),
        )
        result = train(config)
        failures = _failures(result)
    for failure in failures:
        print(f"FAILED: {failure}")
    print("self-test " + ("failed" if failures else "passed"))
    return 1 if failures else 0


def _failures(result: RunResult) -> list[str]:
    failures = []
    if not result.last_val_loss < result.first_val_loss - 1.0:
        failures.append(
            f"validation loss went from {result.first_val_loss:.3f} to {result.last_val_loss:.3f}, expected "
            "a fall by more than 1"
        )
    for file in (result.last_checkpoint, result.best_checkpoint, result.picture, result.report):
        if not file.exists():
            failures.append(f"{file.name} was not written")
    if not result.sample:
        failures.append("no sample was generated")
    return failures


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m flash_attn_train", description=__doc__).parse_args()
    sys.exit(main())
