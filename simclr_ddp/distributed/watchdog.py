"""The watchdog: ranks watch each other, and one that died, hangs or fell out of step ends all ranks and is named.

Each rank runs a thread that writes a heartbeat into the store of the process group. A heartbeat counts itself, the
steps and the collectives that were begun. Rank 0 reads all heartbeats, judges them, and publishes its verdict in its
own; the others read only that of rank 0, so the number of reads grows linearly with the number of ranks. The watchdog
detects

* within two minutes, or the limit if that is shorter: a rank whose thread is silent, because its process or machine has
  stopped or died (the other ranks detect this for rank 0);
* within the limit: ranks that all make no progress, because one waits for what another will never send, and a rank that
  never began. Until every rank has finished its first step this limit is at least two minutes, since pipelines are
  compiled and algorithms chosen during that step;
* a store that can't be reached or does not answer: then the launcher or rank 0 has died.
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

from simclr_ddp.distributed import collectives, rendezvous
from simclr_ddp.system import console
from simclr_ddp.system.errors import DECODING, LOST, one_line

# Seconds without a heartbeat after which a rank counts as gone, unless the limit is shorter. A heartbeat, unlike a
# step, does not take longer if there is more work. Under NCCL nothing else reports a rank that has gone: the others
# wait for it in their next collective.
SILENCE = 120.0
PREPARING = 120.0  # least number of seconds that the first step may take
RESUME = "the same command resumes from the last checkpoint"


@contextmanager
def watching(limit: float, way_out: str = RESUME) -> Iterator[None]:
    """Watch the other ranks in this context; if a collective breaks because a rank has gone, the error names it.

    way_out  end of each message: what the user can do
    """
    watch = Watch(limit, way_out)
    try:
        yield
    except RuntimeError as error:
        # A decoding process that was killed may also report a reset connection.
        if DECODING.search(str(error)) or LOST.search(str(error)) is None:
            raise
        message = watch.lost(str(error))
        if not watch.first_to_report():
            time.sleep(1)  # a launcher ends all ranks when the first exits
            sys.exit(1)
        raise ConnectionError(message) from error
    finally:
        watch.stop()


class Watch:
    """Runs from its construction to `stop`, on every rank; on one process it watches this process.

    If other code has created the process group, its store is not known and nothing is watched.

    limit  seconds without progress; every heartbeat is an entry in the store, written once a second, or less often with
           more than 256 ranks
    """

    def __init__(self, limit: float, way_out: str = RESUME) -> None:
        self._way_out = way_out
        self._limit, self._every = limit, max(1.0, collectives.world_size() / 256)
        self._stopped = threading.Event()
        self._store = rendezvous.watch_store(limit)
        collectives.place["begun"] = 0
        self._post = Post(self._store, collectives.rank(), collectives.world_size(), limit, 3 * self._every, PREPARING)
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self._store is not None or collectives.world_size() == 1:
            self._thread.start()
        if self._store is not None:
            rendezvous.limit_collectives(watched=True)
            threading.Thread(target=self._watch_store, name="watch of the store", daemon=True).start()

    def stop(self) -> None:
        """Notify the other ranks that no more heartbeats will come, and end the thread."""
        self._stopped.set()
        if self._store is not None:
            rendezvous.limit_collectives(watched=False)
        if self._thread.is_alive():
            self._thread.join(5)  # a store whose machine has gone may never answer

    def first_to_report(self) -> bool:
        """Return whether this rank is the first to report an error; also True if the store does not answer."""
        found = [0]

        def ask() -> None:
            with suppress(Exception):  # the store itself may have gone
                found.append(self._store.add("tellers", 1) if self._store is not None else 1)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2)
        return found[-1] in (0, 1)

    def lost(self, error: str) -> str:
        """Return a message that says which rank has gone; wait a few heartbeats to find it."""
        begin = time.monotonic()
        # Rank 0 needs three missing heartbeats and one to read them, and the other ranks one more.
        while self._thread.is_alive() and time.monotonic() - begin < 6 * self._every:
            silent = self._post.suspect(time.monotonic())
            if silent:
                if self._post.judges:
                    time.sleep(2 * self._every)  # time for the others to read it: the store may end with this process
                return f"{silent}; {self._way_out}"
            time.sleep(0.1)
        return f"another rank has gone during a collective ({one_line(error, 80)} ...): it reports why; {self._way_out}"

    def _run(self) -> None:
        beat = 0
        while True:
            leaving = self._stopped.wait(self._every)
            beat = -1 if leaving else beat + 1
            try:
                fault = self._post.turn(collectives.place | {"beat": beat}, time.monotonic())
            except Exception as error:  # torch's store has no error class of its own
                if not self._stopped.is_set():
                    self._end(f"the launcher or rank 0 has gone: their store can't be reached ({one_line(error, 80)})")
                return
            self._answered = time.monotonic()
            if leaving:
                return
            if fault:
                self._end(fault, linger=2 * self._every if self._post.judges and self._store is not None else 0)

    def _watch_store(self) -> None:
        """End this process if the store has stopped answering, because calls to the store have no time limit."""
        before = time.monotonic()
        while not self._stopped.wait(self._every):
            now = time.monotonic()
            if now - before > self._limit / 2:
                self._answered = now  # this rank, or its complete machine, was suspended
            before = now
            if now - self._answered > self._limit:
                self._end(
                    f"the store of the ranks has been silent for {now - self._answered:.0f} s: the process that holds "
                    "it (torchrun, or without it rank 0) or its machine hangs or has gone"
                )

    def _end(self, message: str, linger: float = 0) -> None:
        """End this process, whatever its main thread waits for; the first rank to do so prints the message.

        linger  seconds to wait then, so that the others can read the verdict: the store may end with this process
        """
        if self.first_to_report():
            by = f" (reported by rank {collectives.rank()})" if collectives.world_size() > 1 else ""
            console.end_bars()
            print(f"error: {message}{by}; {self._way_out}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all ranks when the first exits
        time.sleep(linger)
        for decoding in multiprocessing.active_children():
            decoding.kill()  # one that hangs would remain
        os._exit(1)


class Post:
    """One rank's exchange of heartbeats through the store. The caller passes the time and calls it from a thread.

    The lowest rank that has not left reads and judges all ranks; this is rank 0, until it leaves. The others read it.

    soon       seconds of silence after which a rank is suspected to be the one that broke a collective
    preparing  see Judge
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float, soon: float, preparing: float = 0) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._soon = soon
        self._judge = Judge(world_size, limit, preparing)
        self._leader, self._begun = 0, {rank}  # ranks whose entry is known to be in the store
        self._suspect = ""

    @property
    def judges(self) -> bool:
        return self._leader == self._rank

    def turn(self, own: dict[str, Any], now: float) -> str:
        """Write this rank's heartbeat and read those it needs; return a message if something is wrong, or ""."""
        if not self.judges:
            self._write(own)
            beats = self._read([self._leader])
            beat = beats.get(self._leader, {})
            if beat.get("beat") == -1:
                self._leader += 1  # it has left, and the next rank judges from the next turn on
                return ""
            self._judge.hear([self._leader], beats, now)
            self._suspect = beat.get("suspect", "")
            return beat.get("verdict", "") or self._judge.silent(now)
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        verdict = self._judge.look({self._rank: own} | self._read(others), now)
        self._suspect = self._judge.silent(now, self._soon)
        self._write(own | {"verdict": verdict, "suspect": self._suspect})
        return verdict

    def suspect(self, now: float) -> str:
        """Return a message that names the rank that has probably gone; "" if none is known."""
        return self._judge.silent(now, self._soon) or self._suspect

    def _write(self, own: dict[str, Any]) -> None:
        if self._store is not None:
            self._store.set(str(self._rank), json.dumps(own))

    def _read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """Read the heartbeats of the ranks that have begun: the store would wait for one that is not there yet."""
        missing = [rank for rank in ranks if rank not in self._begun]
        if missing and self._store.check([str(rank) for rank in missing]):
            self._begun.update(missing)
        elif len(missing) > 1:
            self._begun.update(rank for rank in missing if self._store.check([str(rank)]))
        there = [rank for rank in ranks if rank in self._begun]
        values = self._store.multi_get([str(rank) for rank in there]) if there else []
        return {rank: json.loads(value) for rank, value in zip(there, values, strict=True)}


class Judge:
    """Finds the rank at fault from heartbeats and the times of their changes; the caller passes the time.

    preparing  seconds without progress that are allowed before and during the first step, if `limit` is less
    """

    def __init__(self, world_size: int, limit: float, preparing: float = 0) -> None:
        self._world_size, self._limit, self._silence = world_size, limit, min(limit, SILENCE)
        self._preparing = max(limit, preparing)
        self._seen: dict[int, tuple[Any, float]] = {}  # rank -> (heartbeat, when it last changed)
        self._moved: tuple[Any, float] | None = None  # (progress of all ranks, when it last changed)
        self._looked: float | None = None
        self._beats: dict[int, dict[str, Any]] = {}

    def look(self, beats: dict[int, dict[str, Any]], now: float) -> str:
        """Return a message if something is wrong, or "". beats: rank -> {beat, step, begun, count, what, ...}"""
        self.hear(range(self._world_size), beats, now)
        silent = self.silent(now)
        if silent:
            return silent
        progress = {rank: beat["count"] for rank, beat in beats.items()}
        if self._moved is None or self._moved[0] != progress or any(b["patient"] for b in beats.values()):
            self._moved = (progress, now)
        preparing = any(_prepares(beat) and beat["beat"] != -1 for beat in beats.values())
        stalled = now - self._moved[1]
        if stalled > (self._preparing if preparing else self._limit):
            return f"nothing has moved for {stalled:.0f} s{_who_waits(beats)}"
        return ""

    def hear(self, ranks: Iterable[int], beats: dict[int, dict[str, Any]], now: float) -> None:
        """Remember when the heartbeats of `ranks` last changed; a rank that is not in `beats` has not begun."""
        if self._looked is not None and now - self._looked > self._silence / 2:
            self._seen, self._moved = {}, None  # this rank, or its complete machine, was suspended
        self._looked = now
        seen = {}
        for rank in ranks:
            beat = beats.get(rank, {}).get("beat", 0)
            before = self._seen.get(rank)
            seen[rank] = before if before is not None and before[0] == beat else (beat, now)
        self._beats, self._seen = beats, seen  # together: another thread may ask which rank is silent

    def silent(self, now: float, limit: float | None = None) -> str:
        """Return a message that names the first rank that has been silent for too long; "" if none has.

        limit  seconds; by default SILENCE, or for a rank that never began the time allowed for preparing
        """
        for rank, (beat, since) in sorted(self._seen.items()):
            most = limit or (self._silence if rank in self._beats else self._preparing)
            if beat != -1 and now - since > most:
                where = f"last seen at {_place(self._beats[rank])}" if rank in self._beats else "it never began"
                return f"rank {rank} has been silent for {now - since:.0f} s; {where}"
        return ""


def _who_waits(beats: dict[int, dict[str, Any]]) -> str:
    """Name the rank that is behind, what it waits for, and a rank that waits for it, if no rank makes progress."""
    more = "timeout=... gives a step more time"
    progress = {rank: beat["count"] for rank, beat in beats.items()}
    behind = min(progress, key=lambda rank: (progress[rank], beats[rank]["beat"] != -1, rank))
    others = [rank for rank in progress if rank != behind]
    if not others:
        return f", at {_place(beats[behind])}; {more}"
    ahead = max(others, key=lambda rank: (progress[rank], -rank))
    if beats[behind]["beat"] == -1:
        return f": rank {behind} has left, at {_place(beats[behind])}; rank {ahead} is at {_place(beats[ahead])}"
    if progress[behind] == progress[ahead]:
        return f": all ranks are at {_place(beats[behind])}; they wait {_waits_for(beats[behind], 'their')}; {more}"
    return (
        f": rank {behind} is behind, at {_place(beats[behind])}; it waits {_waits_for(beats[behind], 'its')}, and "
        f"rank {ahead} waits for it at {_place(beats[ahead])}; {more}"
    )


def _prepares(beat: dict[str, Any]) -> bool:
    """Return whether a rank has not finished its first step."""
    return beat["begun"] < 2


def _place(beat: dict[str, Any]) -> str:
    first = " (its first)" if beat["begun"] == 1 else ""
    last = f", last collective {beat['collective']}" if beat["collective"] != "none" else ""
    return f"step {beat['step']}{first}, {beat['what']}{last}"


def _waits_for(beat: dict[str, Any], whose: str) -> str:
    """Return what a rank must be waiting for, judging by its place."""
    if beat["what"] == "its data":
        return f"for {whose} data"
    device = f"for {whose} device{'s' * (whose == 'their')}"
    return f"in that collective, or {device}" if beat["collective"] != "none" else device
