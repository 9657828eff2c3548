"""Remember whether this process has other ranks, without importing torch: its messages and its end depend on it."""

import os
from collections.abc import Callable

_in_group: Callable[[], bool] | None = None


def join(in_group: Callable[[], bool]) -> None:
    """Remember that this process is one of several ranks, which have met.

    in_group  returns whether this process is still in the process group
    """
    global _in_group
    _in_group = in_group


def have_met() -> bool:
    """Return whether this process has ever been one of several ranks that met, even if it has left them."""
    return _in_group is not None


def is_left_behind() -> bool:
    """Return whether this process is still in its process group, which at its end means that it has failed."""
    return _in_group is not None and _in_group()


def check_variables() -> None:
    """Check torchrun's variables, which other launchers and container platforms set in part. Raises ConnectionError."""
    way_out = "start with torchrun, which sets all of them, or unset them all to train in one process"
    found: dict[str, int] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdigit()):
            raise ConnectionError(f"{name}={text}: must be a whole number; {way_out}")
        if text is not None:
            found[name] = int(text)
    for count, index in (("WORLD_SIZE", "RANK"), ("LOCAL_WORLD_SIZE", "LOCAL_RANK")):
        if found.get(count) == 0:
            raise ConnectionError(f"{count}=0: must be at least 1; {way_out}")
        if count in found and found.get(index, 0) >= found[count]:
            raise ConnectionError(f"{index}={found[index]}: must be less than {count}={found[count]}; {way_out}")
    if "RANK" in found and "WORLD_SIZE" not in found:  # this rank would train alone
        raise ConnectionError(f"RANK={found['RANK']}: WORLD_SIZE not set; {way_out}")
    if found.get("WORLD_SIZE", 1) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ConnectionError(f"WORLD_SIZE={found['WORLD_SIZE']}: {', '.join(missing)} not set; {way_out}")
