"""The same as ``densepred eco-derive``."""

from densepred_cli import main

if __name__ == "__main__":
    main("eco-derive")
