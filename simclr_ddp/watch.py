"""Ranks that watch each other: one that died, stands still, or fell out of step ends all of them, with its name told.

Each rank runs a thread that writes a heartbeat into the store of the process group and reads those of the others. A
heartbeat counts itself, the steps and the collectives that were begun. What is noticed, within the limit: a rank whose
thread is silent (stopped, or its machine is gone), and ranks that all go nowhere (one waits for what another will never
send). A store that can't be reached, or does not answer, is the end of the launcher, or of rank 0.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from simclr_ddp import distributed
from simclr_ddp.cli import LOST

GO_ON = "the same command goes on from the last checkpoint"


@contextmanager
def watching(limit: float) -> Iterator[None]:
    """Watch the other ranks within; a collective that breaks because one of them has gone is told with its name."""
    watch = Watch(limit)
    try:
        yield
    except RuntimeError as error:
        if LOST.search(str(error)) is None:
            raise
        told = watch.lost(str(error))
        if not watch.first_to_tell():
            time.sleep(1)  # a launcher ends all ranks when the first exits
            sys.exit(1)
        raise ConnectionError(told) from error
    finally:
        watch.stop()


class Watch:
    """Runs from its making to `stop`, on every rank; alone, it watches this process. Where the ranks met by others'
    doing, nothing is known of their store, and nothing is watched.

    limit  seconds; every heartbeat is an entry in the store, and every rank reads all of them: once a second, or less
           often with more than 64 ranks
    """

    def __init__(self, limit: float) -> None:
        self._limit, self._every = limit, max(1.0, distributed.world_size() / 64)
        self._stopped, self._judge = threading.Event(), Judge(distributed.world_size(), limit)
        self._store = distributed.watch_store(limit)
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self._store is not None or distributed.world_size() == 1:
            self._thread.start()
        if self._store is not None:
            threading.Thread(target=self._mind_the_store, name="watch of the store", daemon=True).start()

    def stop(self) -> None:
        """Say goodbye: the others no longer expect a heartbeat."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(5)  # a store whose machine has gone may never answer

    def first_to_tell(self) -> bool:
        """Whether no other rank has asked this before, or the store does not say."""
        told = [0]

        def ask() -> None:
            with suppress(Exception):  # it is the store that has gone
                told.append(self._store.add("tellers", 1) if self._store is not None else 1)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2)
        return told[-1] in (0, 1)

    def lost(self, error: str) -> str:
        """Which rank has gone, in a sentence; waits a few heartbeats to know it."""
        begin = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - begin < 5 * self._every:
            silent = self._judge.silent(3 * self._every, time.monotonic())
            if silent:
                return f"{silent}; {GO_ON}"
            time.sleep(0.1)
        return f"another rank has gone in the middle of a collective ({error[:80]} ...): it says why; {GO_ON}"

    def _run(self) -> None:
        beat = 0
        while True:
            leaving = self._stopped.wait(self._every)
            beat = -1 if leaving else beat + 1
            try:
                beats = self._exchange(beat)
            except Exception as error:  # torch's store has no error class of its own
                if not self._stopped.is_set():
                    self._end(f"the launcher or rank 0 is gone: their store can't be reached ({str(error)[:80]})")
                return
            self._answered = time.monotonic()
            if leaving:
                return
            fault = self._judge.look(beats, time.monotonic())
            if fault:
                self._end(fault)

    def _mind_the_store(self) -> None:
        """End this process if the store has stopped answering: no call to it has a time limit of its own."""
        before = time.monotonic()
        while not self._stopped.wait(self._every):
            now = time.monotonic()
            if now - before > self._limit / 2:
                self._answered = now  # it was this rank, or the whole machine, that stood still
            before = now
            if now - self._answered > self._limit:
                self._end(
                    f"the store of the ranks has been silent for {now - self._answered:.0f} s: rank 0, which holds it "
                    "without torchrun, or the launcher's machine stands still or is gone"
                )

    def _exchange(self, beat: int) -> dict[int, dict[str, Any]]:
        """Write this rank's heartbeat; those of all ranks that have begun."""
        own = distributed.place | {"beat": beat}
        if self._store is None:
            return {0: own}
        self._store.set(str(distributed.rank()), json.dumps(own))
        begun = [rank for rank in range(distributed.world_size()) if self._store.check([str(rank)])]
        values = self._store.multi_get([str(rank) for rank in begun])
        return {rank: json.loads(value) for rank, value in zip(begun, values, strict=True)}

    def _end(self, message: str) -> None:
        """End this process at once, whatever its main thread waits for; the first to do so tells why."""
        if self.first_to_tell():
            by = f" (told by rank {distributed.rank()})" if distributed.world_size() > 1 else ""
            print(f"error: {message}{by}; {GO_ON}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all ranks when the first exits
        for decoding in multiprocessing.active_children():
            decoding.kill()  # one that stands still would stay
        os._exit(1)


class Judge:
    """Tells from heartbeats, and when they changed, who is at fault. Plain values, no clock of its own."""

    def __init__(self, world_size: int, limit: float) -> None:
        self._world_size, self._limit = world_size, limit
        self._seen: dict[int, tuple[Any, float]] = {}  # rank -> (heartbeat, when it last changed)
        self._moved: tuple[Any, float] | None = None  # (progress of all ranks, when it last changed)
        self._looked: float | None = None
        self._beats: dict[int, dict[str, Any]] = {}

    def look(self, beats: dict[int, dict[str, Any]], now: float) -> str:
        """What is wrong, in a sentence; "" if nothing is. beats: rank -> {beat, step, count, what}"""
        if self._looked is not None and now - self._looked > self._limit / 2:
            self._seen, self._moved = {}, None  # it was this rank, or the whole machine, that stood still
        self._looked = now
        for rank in range(self._world_size):
            beat = beats.get(rank, {}).get("beat", 0)
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
        self._beats = beats
        silent = self.silent(self._limit, now)
        if silent:
            return silent
        progress = {rank: beat["count"] for rank, beat in beats.items()}
        if self._moved is None or self._moved[0] != progress or any(b["patient"] for b in beats.values()):
            self._moved = (progress, now)
        elif now - self._moved[1] > self._limit:
            since = f"nothing has moved for {now - self._moved[1]:.0f} s"
            behind = min(progress, key=lambda rank: (progress[rank], rank))
            ahead = max(progress, key=lambda rank: (progress[rank], -rank))
            if self._world_size == 1:
                return f"{since}, at {_place(beats[0])}; timeout=... gives a step more time"
            places = [_place(beats[rank]) for rank in (behind, ahead)]
            return f"{since}: rank {behind} is behind, at {places[0]}; rank {ahead} is at {places[1]}"
        return ""

    def silent(self, limit: float, now: float) -> str:
        """The first rank that has been silent for longer than so many seconds, in a sentence; "" if none has."""
        for rank, (beat, since) in sorted(self._seen.items()):
            if beat != -1 and now - since > limit:
                where = f"last seen at {_place(self._beats[rank])}" if rank in self._beats else "it never began"
                return f"rank {rank} has been silent for {now - since:.0f} s; {where}"
        return ""


def _place(beat: dict[str, Any]) -> str:
    last = f", last collective {beat['collective']}" if beat["collective"] != "none" else ""
    return f"step {beat['step']}, {beat['what']}{last}"
