"""The same as ``densepred train``."""

from densepred_cli import main

if __name__ == "__main__":
    main("train")
