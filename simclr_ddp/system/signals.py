"""The signals that ask a run to save and stop, and the one that a memory-mapped file raises when it is cut."""

import ctypes
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from simclr_ddp.system.console import main_rank

PAUSED = 75
STOPPING = b"stopping at the end of this step; a second signal after three seconds kills the run\n"
# What a person, a launcher, a batch system, a closed terminal or a limit of processor time sends to stop a process.
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """In this context the signals in STOP set the flag that the yielded function returns; a later one kills.

    Ctrl-C reaches a process twice, from the terminal and from torchrun, so signals within three seconds count as one.
    SIGHUP stays ignored under nohup, and SIGXCPU, which the system repeats every second, never kills.
    A thread receives them, since Python calls handlers only between bytecode instructions, and a rank that waits in a
    collective executes none.
    """
    stopping, (receiver, sender) = threading.Event(), socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        first: float | None = None
        while number := receiver.recv(1):
            if number[0] not in STOP:
                continue
            if first is None:
                first = time.monotonic()
                stopping.set()
                if main_rank():
                    with suppress(OSError):  # the terminal may be closed
                        os.write(2, STOPPING)
            elif time.monotonic() - first > 3 and number[0] != signal.SIGXCPU:
                os._exit(128 + number[0])

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    stop = [number for number in STOP if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in stop}
    try:
        yield stopping.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        sender.shutdown(socket.SHUT_WR)  # ends it for forked processes too, which closing it here would not
        listener.join()
        sender.close()
        receiver.close()


BUS_ERROR = (
    b"error: a file was cut or overwritten while this process read it, or its disk or /dev/shm failed or is full; "
    b"write data to a new file and rename it, instead of overwriting it; the same command resumes a run\n"
)


@lru_cache(1)
def explain_bus_errors() -> Any:
    """End the process with a sentence at a bus error, instead of without a word.

    Python's own handlers run between bytecode instructions, and so never after an instruction that fails again and
    again. This one is called by the C library; nothing else can be done safely in it.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        os.write(2, BUS_ERROR)
        os._exit(2)

    if not faulthandler.is_enabled():
        ctypes.CDLL(None).signal(signal.SIGBUS, end)
    return end  # which keeps it alive
