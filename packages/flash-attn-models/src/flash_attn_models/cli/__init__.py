"""The command ``flash-attn-generate``."""

from flash_attn_models.cli.command import main

__all__ = ["main"]
