"""The front door: `python train.py` runs configs/digits.yaml; `python train.py --help` says the rest."""

from mole.cli import main

if __name__ == "__main__":
    main()
