"""What every command shares: its arguments, --help, and one-line errors."""

import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from simclr_ddp import config

FLAGS = {
    "--help": "print this text",
    "--debug": "show the traceback of an error",
    "--dry-run": "print the resolved config and stop",
}


# In the errors of a collective whose other ranks have gone.
LOST = re.compile(r"Connection (closed|reset|refused)|Broken pipe|NCCL|[Gg]loo")
MEMORY = re.compile(r"can't allocate memory|not enough memory")
DECODING = re.compile(r"DataLoader worker .*")
# Seconds at most that a command that failed waits for its threads: saver's writes a checkpoint, and metrics' closes the
# mirrors of the metrics, which may try to reach a server.
LAST_WORDS = {"checkpoint": 60.0, "metrics": 15.0}


def main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line on rank 0, now."""
    if main_rank():
        print(text, flush=True)


def warn(text: str | None) -> None:
    """Print a warning, if there is one, on rank 0's stderr, now."""
    if text and main_rank():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def run(
    command: Callable[[Any], int | None],
    cls: type,
    usage: str,
    about: str,
    argv: list[str] | None = None,
    flags: dict[str, str] | None = None,
) -> int:
    """Parse the arguments of a command into its config, run it, and return the exit status.

    usage  names its positional arguments in order, for example "[CONFIG.yaml]" or "SOURCE OUT"; a name in capitals
           fills the option of that name in lower case, CONFIG.yaml is a file of options.
    flags  the command's own, with their meanings; it looks for them itself
    A ValueError or OSError is the user's: one line on stderr and status 2. A command that fails as one of several ranks
    ends the process here, with the same status: what Python and torch do at their end may wait for the other ranks.
    """
    try:
        status = _run(command, cls, usage, about, argv, flags)
    except BaseException as error:
        if not _is_left_behind():
            _wait_for("metrics")
            raise
        status = 1
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        with suppress(OSError, ValueError):  # nobody reads it any more, and the end must come all the same
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            elif isinstance(error.code, str):
                print(error.code, file=sys.stderr)
    if _is_left_behind():
        _end(status)
    _wait_for("metrics")
    return status


def _is_left_behind() -> bool:
    """Whether a command has ended within the ranks' process group: it failed, or it would have left that."""
    distributed = sys.modules.get("simclr_ddp.distributed")
    return distributed is not None and distributed.is_left_behind()


def _wait_for(name: str) -> None:
    """Wait for the threads of that name as long as LAST_WORDS says."""
    end = time.monotonic() + LAST_WORDS[name]
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(max(0, end - time.monotonic()))


def _end(status: int) -> NoReturn:
    """End the process now, once a checkpoint that is being written is on the disk and the metrics are closed, or their
    time has passed."""
    for name in LAST_WORDS:
        _wait_for(name)
    for child in multiprocessing.active_children():
        child.kill()  # those that decode images
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _run(
    command: Callable[[Any], int | None],
    cls: type,
    usage: str,
    about: str,
    argv: list[str] | None,
    flags: dict[str, str] | None,
) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    own = flags or {}
    known = FLAGS | own
    try:
        if "--help" in arguments or "-h" in arguments:
            say(_help(cls, usage, about, known))
            return 0
        settings = parse(arguments, cls, usage, known)
        if "--dry-run" in arguments and "--dry-run" not in own:
            say(config.to_yaml(settings))
            return 0
        return command(settings) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        _report(str(error), alone=isinstance(error, ConnectionError))
        return 2
    except (RuntimeError, MemoryError) as error:
        if debug:
            raise
        on_gpu = type(error).__name__ == "OutOfMemoryError"
        if on_gpu or isinstance(error, MemoryError) or MEMORY.search(str(error)):
            told = " ".join(str(error).split())
            _report(
                f"out of {'GPU memory' if on_gpu else 'memory'} ({told[:80]} ...): more processes, "
                "optim.micro_batch_size (the same negatives, fewer images at once), a smaller data.size, or "
                "precision=bf16 takes less; simclr_ddp.doctor predicts it",
                alone=True,
            )
            return 2
        if found := DECODING.search(str(error)):
            _report(
                f"a decoding process has gone ({found[0][:100]}): often the machine's memory or /dev/shm is full; "
                "fewer data.workers take less, and the same command goes on",
                alone=True,
            )
            return 1
        if LOST.search(str(error)) is None:
            raise
        _report(f"lost the other ranks ({str(error)[:80]} ...): the one that ended first says why")
        return 1


def _report(message: str, alone: bool = False) -> None:
    """One line on stderr. Before the ranks have met all of a machine find the same fault, and its first tells it.

    Later one may be alone with it and has to tell, as it has if rank 0 is the one that did not come; but rank 0 first,
    since the launcher ends all when one exits.
    """
    where = ""
    if not main_rank():
        met = getattr(sys.modules.get("simclr_ddp.distributed"), "met", False)
        if not alone and not met and os.environ.get("LOCAL_RANK") != "0":
            return
        time.sleep(1)
        where = f"rank {os.environ['RANK']}: "
    print(f"error: {where}{' '.join(message.split())} (--debug shows where)", file=sys.stderr, flush=True)


def parse(arguments: list[str], cls: type, usage: str, flags: dict[str, str] = FLAGS) -> Any:
    """The config that a command makes of its arguments; ValueError in one sentence."""
    positional, overrides = [], {}
    for argument in arguments:
        if argument in flags:
            continue
        if argument.startswith("-"):
            raise ValueError(f"unknown flag {argument}: {', '.join(flags)} are known; options are written key=value")
        if re.match(r"[a-z_][a-z0-9_.]*=", argument):
            key, value = config.parse_override(argument)
            overrides[key] = value
        else:
            positional.append(argument)
    slots = usage.replace("[", "").replace("]", "").split()
    if len(positional) > len(slots):
        raise ValueError(f"argument {positional[len(slots)]} is one too many: usage is {usage} [key=value ...]")
    layers: list[tuple[str, dict[str, Any]]] = []
    for slot, value in zip(slots, positional, strict=False):
        if slot == "CONFIG.yaml":
            layers.append((value, {"name": Path(value).stem} | config.read_yaml(value)))
        else:
            layers.append(("the command line", {slot.lower(): value}))
    return config.build(cls, [*layers, ("the command line", overrides)])


def _help(cls: type, usage: str, about: str, known: dict[str, str]) -> str:
    flags = "\n".join(f"  {flag:<14} {meaning}" for flag, meaning in known.items())
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name} " if spec else ""
    return f"{about.strip()}\n\nusage: {program}{usage} [key=value ...]\n\n{flags}\n\noptions:\n{config.help_text(cls)}"
