"""Training through the CUDA attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flash_attn_train.configs import TrainConfig
from flash_attn_train.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_kernel_and_portable_path_train_to_the_same_loss(
    small_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto is bf16 through a kernel; 32-true takes the portable path. Other seeds show what noise is."""

    def final_loss(precision: str, seed: int, path: str) -> float:
        config = small_config(
            output_dir=str(tmp_path / f"{precision}{seed}"),
            seed=seed,
            model={"n_head": 1, "d_model": 64, "max_seqlen": 128},
            trainer={"max_steps": 60, "batch_size": 8, "val_every_n_steps": 60, "precision": precision},
            optimizer={"lr": 5e-3},
        )
        loss = train(config).last_val_loss
        attention = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("attention")
        )
        assert path in attention.split("(")[0]
        return loss

    portable = [final_loss("32-true", seed, "portable") for seed in range(3)]
    kernel = final_loss("auto", 0, "sm")
    noise = max(portable) - min(portable)
    assert abs(kernel - portable[0]) < max(noise, 0.01 * portable[0])
