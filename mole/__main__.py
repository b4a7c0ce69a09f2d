"""`python -m mole` is the command `mole`."""

from mole.cli import main

if __name__ == "__main__":
    main()
