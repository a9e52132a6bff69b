"""The same as ``densepred benchmark``."""

from densepred_cli import main

if __name__ == "__main__":
    main("benchmark")
