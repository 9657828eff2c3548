"""Rendezvous of the ranks of a run: joining and leaving the process group."""

import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from simclr_ddp.distributed.collectives import rank, world_size
from simclr_ddp.system import ranks
from simclr_ddp.system.errors import one_line

ARRIVAL = 120.0  # longest wait of the ranks for each other at the start, in seconds
_met_at: tuple[str, int, str] | None = None  # address and port of the common store, and the prefix of this start
_longest = timedelta(seconds=2 * ARRIVAL)  # timeout of a collective while no watchdog runs


def start(device: torch.device, limit: float = 600) -> None:
    """Join the process group described by torchrun's variables, if they are set: NCCL on CUDA, gloo on CPU.

    limit  seconds after which the watchdog reports a rank that does not enter a collective. Before the watchdog runs,
           the timeout of the collective itself is twice as long, and at least four minutes. At the start ranks wait
           for each other at most ARRIVAL seconds.

    Raises ConnectionError if the ranks can't meet.
    """
    global _longest
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        store = dist.PrefixStore("group", _meet(size, min(limit, ARRIVAL)))
        backend, _longest = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=2 * max(limit, ARRIVAL))
        dist.init_process_group(backend, store=store, rank=rank(), world_size=size, timeout=_longest)
        ranks.join(dist.is_initialized)


def start_here(rank: int, size: int, file: str) -> None:
    """Join a gloo group of processes on this machine that meet through a file."""
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=size, timeout=timedelta(minutes=10))


def _meet(size: int, limit: float) -> dist.Store:
    """Return the common store of all ranks, after all have connected."""
    global _met_at
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher serves it
    within = timedelta(seconds=limit)
    try:
        store = dist.TCPStore(
            address, port, size, is_master=serves, timeout=within, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        does = "open" if serves else "reach"
        raise ConnectionError(
            f"the ranks can't meet at {address}:{port}: rank {rank()} could not {does} it ({one_line(error, 120)}); "
            "set --master-addr and --master-port, or MASTER_ADDR and MASTER_PORT, to a free port of rank 0's machine"
        ) from error
    token = _token(store, size, within)
    _met_at = (address, port, token)
    return dist.PrefixStore(token, store)


def _token(store: dist.Store, size: int, within: timedelta) -> str:
    """Return a random token for this start, drawn by rank 0, after all ranks have received it.

    torchrun's store outlives a start, and TORCHELASTIC_RESTART_COUNT differs between a node that has seen a failure and
    one that has seen only a new member. The token distinguishes entries of this start from those of earlier ones.
    """
    token, end = "", time.monotonic() + within.total_seconds()
    try:
        if rank() == 0:
            token = secrets.token_hex(4)
            store.set(f"{token}/here/0", "")
            store.set("start", token)
        while time.monotonic() < end:
            if rank() == 0:
                if store.check([f"{token}/here/{r}" for r in range(size)]):
                    store.set("start", "")  # no rank may join later
                    store.set(f"{token}/all", "")
                    return token
            elif store.check(["start"]) and (now := store.get("start").decode()) not in ("", token):
                token = now
                store.set(f"{token}/here/{rank()}", "")
            elif token and store.check([f"{token}/all"]):
                return token
            time.sleep(0.02)
        missing = [r for r in range(size) if not store.check([f"{token}/here/{r}"])] if token else [0]
    except RuntimeError:  # rank 0 has given up before, and the store ended with it
        missing = []
    shown = ", ".join(map(str, missing[:8])) + " ..." * (len(missing) > 8) or "another"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    raise ConnectionError(
        f"rank {shown} of {size} did not connect to {address}:{port} within {within.total_seconds():.0f} s; start all "
        f"{size} processes, each with a different RANK"
    )


# torch 2.14 renamed this function.
_set_timeout: Any = getattr(dist, "set_timeout", None) or getattr(dist.distributed_c10d, "_set_pg_timeout", None)


def limit_collectives(watched: bool) -> None:
    """Set the timeout of the collectives to come: unlimited while a watchdog runs, which judges better.

    The timeout of a collective also counts the time in which the job is suspended: it would fail when it is resumed.
    """
    _set_timeout(timedelta(days=365) if watched else _longest)


def watch_store(limit: float) -> dist.Store | None:
    """Open a separate connection to the common store, through which ranks report their progress to each other.

    Returns None if the process group was created elsewhere, since its store is unknown. Raises ConnectionError if the
    store does not respond within `limit` seconds.
    """
    if world_size() == 1 or _met_at is None:
        return None
    address, port, token = _met_at
    made: list[dist.Store] = []

    def connect() -> None:
        with suppress(RuntimeError):
            made.append(dist.TCPStore(address, port, is_master=False))

    # A thread connects, since the handshake has no timeout for a store that does not respond.
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(limit)
    if not made:
        raise ConnectionError(
            f"the common store of the ranks at {address}:{port} does not respond: rank 0 (which holds it without "
            "torchrun) or the launcher hangs or has ended; start the run again"
        )
    return dist.PrefixStore(f"{token}/watch", made[0])


def stop() -> None:
    """Leave the process group, except while an exception propagates: `config.command.run` then ends the process.

    With NCCL, leaving waits for every collective that this rank has begun. If only this rank fails, the others never
    enter some of them, so it would hang without reporting its error.
    """
    if dist.is_initialized() and (sys.exc_info()[0] is None or not ranks.have_met()):
        dist.destroy_process_group()
