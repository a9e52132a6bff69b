"""The same as ``densepred test``."""

from densepred_cli import main

if __name__ == "__main__":
    main("test")
