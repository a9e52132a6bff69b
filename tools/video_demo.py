"""The same as ``densepred video``."""

from densepred_cli import main

if __name__ == "__main__":
    main("video")
