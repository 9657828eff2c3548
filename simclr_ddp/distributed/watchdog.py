"""Ranks that watch each other: one that died, hangs, or fell out of step ends all of them, and is named.

Each rank runs a thread that writes a heartbeat into the store of the process group. A heartbeat counts itself, the
steps and the collectives that were begun. Rank 0 reads all of them, judges, and publishes its verdict in its own; the
others read that of rank 0, so that the store answers a number of questions that grows as the number of ranks, not as
its square. What is noticed: within two minutes, or the limit if that is shorter, a rank whose thread is silent
(stopped, or gone, or its machine is; the others notice that of rank 0); within the limit, ranks that all make no
progress (one waits for what another will never send), and a rank that never began. A store that can't be reached, or
does not answer, is the end of the launcher, or of rank 0.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from simclr_ddp import distributed
from simclr_ddp.cli import LOST

# Seconds without a heartbeat, at most, after which a rank has gone: a heartbeat, unlike a step, does not take longer
# where the work is large. Under NCCL nothing else tells of a rank that has gone: the others wait for it in their next
# collective.
SILENCE = 120.0
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

    limit  seconds; every heartbeat is an entry in the store, written once a second, or less often with more than 256
           ranks
    """

    def __init__(self, limit: float) -> None:
        self._limit, self._every = limit, max(1.0, distributed.world_size() / 256)
        self._stopped = threading.Event()
        self._store = distributed.watch_store(limit)
        self._post = Post(self._store, distributed.rank(), distributed.world_size(), limit, 3 * self._every)
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
        # Rank 0 knows after three heartbeats and one to see them in, and the others one after it.
        while self._thread.is_alive() and time.monotonic() - begin < 6 * self._every:
            silent = self._post.suspect(time.monotonic())
            if silent:
                if self._post.judges:
                    time.sleep(2 * self._every)  # the others read it, perhaps in a store that ends with this process
                return f"{silent}; {GO_ON}"
            time.sleep(0.1)
        return f"another rank has gone in the middle of a collective ({error[:80]} ...): it says why; {GO_ON}"

    def _run(self) -> None:
        beat = 0
        while True:
            leaving = self._stopped.wait(self._every)
            beat = -1 if leaving else beat + 1
            try:
                fault = self._post.turn(distributed.place | {"beat": beat}, time.monotonic())
            except Exception as error:  # torch's store has no error class of its own
                if not self._stopped.is_set():
                    self._end(f"the launcher or rank 0 is gone: their store can't be reached ({str(error)[:80]})")
                return
            self._answered = time.monotonic()
            if leaving:
                return
            if fault:
                self._end(fault, linger=2 * self._every if self._post.judges and self._store is not None else 0)

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

    def _end(self, message: str, linger: float = 0) -> None:
        """End this process, whatever its main thread waits for; the first to do so says why.

        linger  seconds to stay after that, for the others to read the verdict: the store may end with this process
        """
        if self.first_to_tell():
            by = f" (told by rank {distributed.rank()})" if distributed.world_size() > 1 else ""
            print(f"error: {message}{by}; {GO_ON}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all ranks when the first exits
        time.sleep(linger)
        for decoding in multiprocessing.active_children():
            decoding.kill()  # one that stands still would stay
        os._exit(1)


class Post:
    """One rank's exchange of heartbeats through the store. Has no clock of its own, and no thread.

    The lowest rank that has not left reads and judges all ranks: rank 0, as long as it is there. The others read it.

    soon  seconds of silence after which a rank is suspected to be the one that broke a collective
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float, soon: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._soon = soon
        self._judge = Judge(world_size, limit)
        self._leader, self._begun = 0, {rank}  # ranks whose entry is known to be in the store
        self._suspect = ""

    @property
    def judges(self) -> bool:
        return self._leader == self._rank

    def turn(self, own: dict[str, Any], now: float) -> str:
        """Write this rank's heartbeat and read what concerns it: what is wrong, in a sentence, or ""."""
        if not self.judges:
            self._write(own)
            heard = self._read([self._leader])
            if heard.get(self._leader, {}).get("beat") == -1:
                self._leader += 1  # it has left, and the next one judges from the next turn on
                return ""
            self._judge.hear([self._leader], heard, now)
            told = heard.get(self._leader, {})
            self._suspect = told.get("suspect", "")
            return told.get("verdict", "") or self._judge.silent(now)
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        verdict = self._judge.look({self._rank: own} | self._read(others), now)
        self._suspect = self._judge.silent(now, self._soon)
        self._write(own | {"verdict": verdict, "suspect": self._suspect})
        return verdict

    def suspect(self, now: float) -> str:
        """The rank that has probably gone, in a sentence; "" if none is known."""
        return self._judge.silent(now, self._soon) or self._suspect

    def _write(self, own: dict[str, Any]) -> None:
        if self._store is not None:
            self._store.set(str(self._rank), json.dumps(own))

    def _read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """The heartbeats of those that have begun: reading what is not there yet would wait for it."""
        missing = [rank for rank in ranks if rank not in self._begun]
        if missing and self._store.check([str(rank) for rank in missing]):
            self._begun.update(missing)
        elif len(missing) > 1:
            self._begun.update(rank for rank in missing if self._store.check([str(rank)]))
        there = [rank for rank in ranks if rank in self._begun]
        values = self._store.multi_get([str(rank) for rank in there]) if there else []
        return {rank: json.loads(value) for rank, value in zip(there, values, strict=True)}


class Judge:
    """Tells from heartbeats, and when they changed, who is at fault. Plain values, no clock of its own."""

    def __init__(self, world_size: int, limit: float) -> None:
        self._world_size, self._limit, self._silence = world_size, limit, min(limit, SILENCE)
        self._seen: dict[int, tuple[Any, float]] = {}  # rank -> (heartbeat, when it last changed)
        self._moved: tuple[Any, float] | None = None  # (progress of all ranks, when it last changed)
        self._looked: float | None = None
        self._beats: dict[int, dict[str, Any]] = {}

    def look(self, beats: dict[int, dict[str, Any]], now: float) -> str:
        """What is wrong, in a sentence; "" if nothing is. beats: rank -> {beat, step, count, what}"""
        self.hear(range(self._world_size), beats, now)
        silent = self.silent(now)
        if silent:
            return silent
        progress = {rank: beat["count"] for rank, beat in beats.items()}
        if self._moved is None or self._moved[0] != progress or any(b["patient"] for b in beats.values()):
            self._moved = (progress, now)
        elif now - self._moved[1] > self._limit:
            since = f"nothing has moved for {now - self._moved[1]:.0f} s"
            behind = min(progress, key=lambda rank: (progress[rank], beats[rank]["beat"] != -1, rank))
            ahead = max(progress, key=lambda rank: (progress[rank], -rank))
            places = [_place(beats[rank]) for rank in (behind, ahead)]
            more = "timeout=... gives a step more time"
            if self._world_size == 1:
                return f"{since}, at {places[0]}; {more}"
            left = beats[behind]["beat"] == -1
            if progress[behind] == progress[ahead] and not left:
                return f"{since}: all ranks are at {places[0]}; they wait {_waits_for(beats[behind])}; {more}"
            is_there = f"rank {ahead} is at {places[1]}"
            return f"{since}: rank {behind} {'has left' if left else 'is behind'}, at {places[0]}; {is_there}"
        return ""

    def hear(self, ranks: Iterable[int], beats: dict[int, dict[str, Any]], now: float) -> None:
        """Remember when the heartbeats of those ranks last changed; one that is not in `beats` has not begun."""
        if self._looked is not None and now - self._looked > self._silence / 2:
            self._seen, self._moved = {}, None  # it was this rank, or the whole machine, that stood still
        self._looked = now
        seen = {}
        for rank in ranks:
            beat = beats.get(rank, {}).get("beat", 0)
            before = self._seen.get(rank)
            seen[rank] = before if before is not None and before[0] == beat else (beat, now)
        self._beats, self._seen = beats, seen  # at once: another thread may ask who is silent

    def silent(self, now: float, limit: float | None = None) -> str:
        """The first rank that has been silent for too long, in a sentence; "" if none has.

        limit  seconds; by default SILENCE, and the whole limit for one that never began: it may still be preparing
        """
        for rank, (beat, since) in sorted(self._seen.items()):
            most = limit or (self._silence if rank in self._beats else self._limit)
            if beat != -1 and now - since > most:
                where = f"last seen at {_place(self._beats[rank])}" if rank in self._beats else "it never began"
                return f"rank {rank} has been silent for {now - since:.0f} s; {where}"
        return ""


def _place(beat: dict[str, Any]) -> str:
    last = f", last collective {beat['collective']}" if beat["collective"] != "none" else ""
    return f"step {beat['step']}, {beat['what']}{last}"


def _waits_for(beat: dict[str, Any]) -> str:
    """What ranks that are all at the same place can only be waiting for."""
    if beat["what"] == "its data":
        return "for their data"
    return "in that collective, or for their devices" if beat["collective"] != "none" else "for their devices"
