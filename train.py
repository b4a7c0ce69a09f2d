"""The front door: `python train.py` is `mole train`, and runs configs/digits.yaml; `--help` says the rest."""

import sys

from mole.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
