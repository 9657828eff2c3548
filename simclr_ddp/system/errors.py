"""Recognise errors of libraries, and shorten them to one line."""

import re

# Found in the error of a collective if another rank has gone.
LOST = re.compile(r"Connection (closed|reset|refused)|Broken pipe|NCCL|[Gg]loo")
MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|not enough memory|can't start new thread|failed to map segment"
)
DECODING = re.compile(r"DataLoader worker .*")


def one_line(error: object, longest: int | None = None) -> str:
    """Return the text of an error on one line, cut after `longest` characters."""
    return " ".join(str(error).split())[:longest]
