"""`lightning-lte`: Lightning's command line with the LTE strategy preset.

    lightning-lte fit --config examples/digits.yaml --trainer.strategy.heads=16

The model and the data are named in the YAML by `class_path`. Without a `strategy` in the YAML, `LTEStrategy()` with its
defaults is meant. The same files work in a LightningCLI of your own.
"""

from __future__ import annotations

import os
import sys

try:
    from lightning.pytorch.cli import ArgsType, LightningCLI
except ModuleNotFoundError:  # under its older name
    from pytorch_lightning.cli import ArgsType, LightningCLI  # type: ignore[assignment]

STRATEGY = {"class_path": "lightning_lte.LTEStrategy"}


def run(args: ArgsType = None) -> LightningCLI:
    """Run the command line and return what it made.

    Args:
        args: what to parse in place of `sys.argv[1:]`.
    """
    # A console script has its own folder on the path, where `python -m` has the current one: class paths are
    # to mean the same in both.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults={"strategy": STRATEGY},
        args=args,
    )


def main() -> None:
    """The console script. It returns nothing, for that becomes the exit status."""
    run()


if __name__ == "__main__":
    main()
