"""The same as ``densepred eco-tradeoff``."""

from densepred_cli import main

if __name__ == "__main__":
    main("eco-tradeoff")
