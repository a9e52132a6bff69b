"""The same as ``densepred evaluate``."""

from densepred_cli import main

if __name__ == "__main__":
    main("evaluate")
