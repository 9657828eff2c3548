"""The part that all commands share: arguments, --help, and one-line errors."""

import json
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

from simclr_ddp import __version__
from simclr_ddp.config import options, recipes
from simclr_ddp.system import ranks
from simclr_ddp.system.console import end_bars, main_rank, printable, say, shown
from simclr_ddp.system.errors import DECODING, LOST, MEMORY, one_line
from simclr_ddp.system.signals import PAUSED, explain_bus_errors

FLAGS = {
    "--help": "print this text",
    "--debug": "show the traceback of an error",
    "--dry-run": "print the resolved config and stop",
    "--version": "print the version of simclr_ddp",
}


# The most seconds that a failed command waits for its threads: "checkpoint" writes a checkpoint, and "metrics" closes
# the mirrors of the metrics, which may try to reach a server.
THREAD_SECONDS = {"checkpoint": 60.0, "metrics": 15.0}


@shown()
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
           fills the option of that name in lower case, CONFIG.yaml is a file of options, or the bare name of one that
           the package brings along. After "--", which the command
           itself looks for, it is only shown.
    flags  further flags of the command, with their meanings; the command itself looks for them
    Messages of the package are shown meanwhile. A ValueError or OSError is the user's error: it gives one line on
    stderr and status 2. A command that fails as one of several ranks ends the process here, with the same status,
    because the exit of Python and torch may wait for the other ranks.
    """
    explain_bus_errors()
    try:
        status = _run(command, cls, usage, about, argv, flags)
    except BaseException as error:
        if not ranks.is_left_behind():
            _wait_for("metrics")
            raise
        status = 1
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        with suppress(OSError, ValueError):  # stderr may be closed, and the process must end all the same
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            elif isinstance(error.code, str):
                print(error.code, file=sys.stderr)
    if ranks.is_left_behind():
        _end(status)
    _wait_for("metrics")
    return status


def _wait_for(name: str) -> None:
    """Wait for the threads of that name, for at most the seconds in THREAD_SECONDS."""
    end = time.monotonic() + THREAD_SECONDS[name]
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(max(0, end - time.monotonic()))


def _end(status: int) -> NoReturn:
    """End the process, after waiting for limited time until the checkpoint is written and the metrics are closed."""
    for name in THREAD_SECONDS:
        _wait_for(name)
    for child in multiprocessing.active_children():
        child.kill()  # processes that decode images
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the stream may be closed
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
        if "--version" in arguments:
            say(f"simclr_ddp {__version__}")
            return 0
        settings = parse(arguments, cls, usage, known)
        if "--dry-run" in arguments and "--dry-run" not in own:
            say(options.to_yaml(settings))
            return 0
        status = command(settings) or 0
        if status == PAUSED:
            _notify_launcher("not a failure: the run is paused, and the same command resumes it")
        return status
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        _report(str(error), alone=isinstance(error, ConnectionError))
        return 2
    except (RuntimeError, MemoryError, ImportError) as error:  # a library may not fit into memory
        if debug:
            raise
        on_gpu = type(error).__name__ == "OutOfMemoryError"
        if on_gpu or isinstance(error, MemoryError) or MEMORY.search(str(error)):
            _report(
                f"out of {'GPU memory' if on_gpu else 'memory'} ({one_line(error, 80)} ...): use more processes, "
                "optim.micro_batch_size (the same negatives, fewer images at once), a smaller data.size, or "
                "precision=bf16; simclr_ddp.doctor predicts the memory",
                alone=True,
            )
            return 2
        if found := DECODING.search(str(error)):
            _report(
                f"a decoding process has gone ({found[0][:100]}): often the machine's memory or /dev/shm is full, "
                "or the data file was overwritten; use fewer workers; the same command resumes a run",
                alone=True,
            )
            return 1
        if LOST.search(str(error)) is None:
            raise
        _report(f"lost the other ranks ({one_line(error, 80)} ...): the error of the first to end says why")
        return 1


def _report(message: str, alone: bool = False) -> None:
    """Print an error as one line on stderr.

    Before the ranks have met, all ranks of a machine find the same error, and only its first rank prints it. If a rank
    may be `alone` with its error, or the ranks have met, every rank prints it, rank 0 first, since the launcher ends
    all ranks when one exits.
    """
    where = ""
    if not main_rank():
        if not alone and not ranks.have_met() and os.environ.get("LOCAL_RANK") != "0":
            return
        time.sleep(1)
        where = f"rank {os.environ['RANK']}: "
    end_bars()
    print(f"error: {where}{printable(one_line(message))} (--debug shows where)", file=sys.stderr, flush=True)
    _notify_launcher(f"error: {where}{printable(one_line(message))}")


def is_option(argument: str, cls: type) -> bool:
    """Return whether an argument is written key=value, rather than the path of a folder such as lr=0.1."""
    known = argument.partition("=")[0] in options.options(cls)
    return bool(re.match(r"[a-z_][a-z0-9_.]*=", argument)) and (known or not Path(argument).exists())


def _notify_launcher(message: str) -> None:
    """Let torchrun's own report of some thirty lines, which follows, end with this message as the root cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def parse(arguments: list[str], cls: type, usage: str, flags: dict[str, str] = FLAGS) -> Any:
    """Build the config of a command from its arguments. Raises ValueError with a message of one sentence."""
    positional, overrides = [], {}
    for argument in arguments:
        if argument in flags:
            continue
        if argument.startswith("-"):
            raise ValueError(f"unknown flag {argument}: choose from {', '.join(flags)}; options are written key=value")
        if is_option(argument, cls):
            if any("\udc80" <= c <= "\udcff" for c in argument):  # how Python represents bytes of other encodings
                raise ValueError(
                    f"{printable(argument)}: has bytes that are not UTF-8, which config.yaml can't hold; rename the "
                    "file or folder"
                )
            key, value = options.parse_override(argument)
            overrides[key] = value
        else:
            positional.append(argument)
    slots = usage.partition(" -- ")[0].replace("[", "").replace("]", "").split()
    if len(positional) > len(slots):
        raise ValueError(f"argument {positional[len(slots)]} is one too many: the usage is {usage} [key=value ...]")
    layers: list[tuple[str, dict[str, Any]]] = []
    for slot, value in zip(slots, positional, strict=False):
        if slot == "CONFIG.yaml":
            path = recipes.find(value, recipes.KINDS.get(cls.__name__, "pretrain"))
            layers.append((path, {"name": printable(Path(path).stem)} | options.read_yaml(path)))
        else:
            layers.append((options.COMMAND_LINE, {slot.lower(): value}))
    return options.build(cls, [*layers, (options.COMMAND_LINE, overrides)])


def _help(cls: type, usage: str, about: str, known: dict[str, str]) -> str:
    flags = "\n".join(f"  {flag:<14} {meaning}" for flag, meaning in known.items())
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name} " if spec else ""
    own, rest, command = usage.partition(" -- ")
    usage = f"{own} [key=value ...]{rest}{command}"
    return f"{about.strip()}\n\nusage: {program}{usage}\n\n{flags}\n\noptions:\n{options.help_text(cls)}"
