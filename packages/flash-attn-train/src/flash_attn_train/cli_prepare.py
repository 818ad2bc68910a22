"""The command `flash-attn-prepare`: downloads and tokenises the data of a run before it, on a machine without a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flash_attn_train import __version__
from flash_attn_train.command import command

_EPILOG = """examples:
  flash-attn-prepare data=openwebtext tokenizer.name=gpt2
  flash-attn-prepare experiment=quickstart --verify

It takes the groups and keys of flash-attn-train and leaves its results in data.cache_dir, where a run with the same
data, tokenizer and task finds them.
"""


@command("flash-attn-prepare")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see :func:`~flash_attn_train.command.command`."""
    parser = argparse.ArgumentParser(
        prog="flash-attn-prepare",
        description="Downloads and tokenises the data of a run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for flash-attn-train")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all prepared files again and check them against their checksums",
    )
    parser.add_argument("--version", action="version", version=f"flash-attn-prepare {__version__}")
    arguments = parser.parse_args(argv)
    prepare(arguments.overrides, verify=arguments.verify)
    return 0


def prepare(overrides: Sequence[str], *, verify: bool = False) -> None:
    """Prepares the data of the config that the overrides make, and says what they are.

    Raises:
        UserError: the config is wrong, or the data cannot be prepared.
    """
    from flash_attn_train.cli import compose_config
    from flash_attn_train.console import say
    from flash_attn_train.data import build_data
    from flash_attn_train.data.entry import verify_entry

    data = build_data(compose_config(overrides))
    for name, text in data.describe().items():
        say(f"{name:<10} {text}")
    entry = data.facts.cache_entry
    if entry is None:
        say("These data are read by each run; there is nothing to keep.")
        return
    say(f"{'prepared':<10} {entry}")
    if verify:
        say(f"{'verified':<10} {verify_entry(entry):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
