"""The same as ``densepred convert``."""

from densepred_cli import main

if __name__ == "__main__":
    main("convert")
