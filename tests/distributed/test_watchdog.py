"""Ranks that die, hang or fall out of step are reported by name and within the limit."""

from typing import Any

import pytest
import torch.distributed as dist

from simclr_ddp.distributed.watchdog import Judge, Post, watching


def beats(**changes: dict[str, Any]) -> Any:
    """A world of three ranks: beats(r1={"beat": None}) etc. change what rank 1 says."""

    def at(second: int) -> dict[int, dict[str, Any]]:
        said: dict[int, dict[str, Any]] = {}
        for rank in range(3):
            own = {"beat": second, "step": second, "begun": 9, "count": 4 * second, "what": "forward", "patient": False}
            own["collective"] = "barrier" if rank == 2 else "none"
            said[rank] = own | {k: f(second) for k, f in changes.get(f"r{rank}", {}).items()}
        return said

    return at


def verdicts(at: Any, seconds: int, limit: float = 10, preparing: float = 0) -> dict[int, str]:
    judge = Judge(3, limit, preparing)
    said = {second: judge.look(at(second), float(second)) for second in range(1, seconds)}
    return {second: text for second, text in said.items() if text}


def test_nothing_is_reported_if_all_ranks_make_progress() -> None:
    assert verdicts(beats(), 100) == {}
    slow = {"count": lambda s: s // 9, "step": lambda s: s // 9}
    assert verdicts(beats(r0=slow, r1=slow, r2=slow), 100) == {}, "a step may take nearly as long as the limit"


def test_a_silent_rank_is_named_with_its_place() -> None:
    frozen = {"beat": lambda s: min(s, 20), "step": lambda s: min(s, 20), "what": lambda s: "its data"}
    said = verdicts(beats(r2=frozen), 35)
    assert (
        min(said) == 31
        and said[31] == "rank 2 has been silent for 11 s; last seen at step 20, its data, last collective barrier"
    )


def test_a_rank_that_pauses_for_less_than_the_limit_is_forgiven() -> None:
    pause = {"beat": lambda s: s if s < 20 or s > 28 else 20}
    assert verdicts(beats(r1=pause), 60) == {}


def test_a_rank_that_never_began() -> None:
    def at(second: int) -> dict[int, dict[str, Any]]:
        return {rank: beat for rank, beat in beats()(second).items() if rank != 1}

    said = verdicts(at, 15)
    assert min(said) == 12 and said[12].startswith("rank 1 has been silent") and "never began" in said[12]


def test_silence_is_reported_within_two_minutes_and_all_else_at_the_limit() -> None:
    """A step may take as long as the limit, and so may what a rank does before its first heartbeat."""
    slow = {"count": lambda s: s // 590, "step": lambda s: s // 590}
    frozen = {"beat": lambda s: min(s, 20), "step": lambda s: min(s, 20)}
    assert verdicts(beats(r0=slow, r1=slow, r2=slow), 1200, limit=600) == {}
    said = verdicts(beats(r0=slow, r1=slow | frozen, r2=slow), 200, limit=600)
    assert min(said) == 141 and said[141].startswith("rank 1 has been silent for 121 s; last seen at step 20")

    def late(second: int) -> dict[int, dict[str, Any]]:
        return {rank: beat for rank, beat in beats()(second).items() if rank != 1 or second > 590}

    assert verdicts(late, 700, limit=600) == {}
    world = Posts(8, limit=600)
    world.seconds(range(1, 5))
    world.seconds(range(5, 127), silent=0)
    assert set(world.ended.values()) == {"rank 0 has been silent for 121 s; last seen at step 4, forward"}


def test_ranks_that_wait_for_each_other_for_ever() -> None:
    """All threads beat, no rank moves: the one that is behind is named."""
    stuck = {"count": lambda s: min(4 * s, 80), "step": lambda s: min(s, 20)}
    behind = {"count": lambda s: min(4 * s, 77), "step": lambda s: min(s, 19), "what": lambda s: "its data"}
    said = verdicts(beats(r0=stuck, r1=behind, r2=stuck), 40)
    assert min(said) == 31
    assert said[31] == (
        "nothing has moved for 11 s: rank 1 is behind, at step 19, its data; it waits for its data, and rank 0 waits "
        "for it at step 20, forward; timeout=... gives a step more time"
    )


def test_the_first_step_may_take_longer() -> None:
    """It compiles the pipeline of the images: in a cold process on a busy machine, later on one rank than on others."""
    step_9 = {"step": lambda s: 9, "begun": lambda s: 1 + (s > 60)}

    def slow(until: int) -> dict[str, Any]:
        return step_9 | {"count": lambda s: 31 + max(0, s - until), "what": lambda s: "its data" if s <= until else "f"}

    quick = step_9 | {"count": lambda s: 33 + max(0, s - 60), "collective": lambda s: "all_reduce of [5]"}
    assert verdicts(beats(r0=slow(60), r1=quick, r2=quick), 100, preparing=120) == {}
    assert min(verdicts(beats(r0=slow(60), r1=quick, r2=quick), 100)) < 30, "the limit of every other step"

    stuck = {key: value for key, value in quick.items() if key != "begun"} | {"begun": lambda s: 1}
    stuck["count"] = lambda s: 33
    said = verdicts(
        beats(r0=stuck | {"count": lambda s: 31, "what": lambda s: "its data"}, r1=stuck, r2=stuck), 200, 10, 120
    )
    assert min(said) == 122
    assert said[122] == (
        "nothing has moved for 121 s: rank 0 is behind, at step 9 (its first), its data, last collective all_reduce of "
        "[5]; it waits for its data, and rank 1 waits for it at step 9 (its first), forward, last collective "
        "all_reduce of [5]; timeout=... gives a step more time"
    )
    later = stuck | {"begun": lambda s: 2}
    assert min(verdicts(beats(r0=later, r1=later, r2=later), 200, 10, 120)) == 12, "after the first step of all"
    assert min(verdicts(beats(r0=later, r1=stuck, r2=later), 200, 10, 120)) == 122, "of all"
    assert min(verdicts(beats(r0=later, r1=stuck, r2=later), 900, 600, 120)) == 602


def test_no_rank_is_compared_with_itself() -> None:
    stuck = {"count": lambda s: 80, "step": lambda s: 20}
    said = verdicts(beats(r0=stuck | {"beat": lambda s: s if s < 10 else -1}, r1=stuck, r2=stuck), 40)
    assert min(said) == 12 and said[12].startswith("nothing has moved for 11 s: rank 0 has left, at step 20, forward; ")
    assert said[12].endswith("; rank 1 is at step 20, forward")
    judge, beat = Judge(2, 10, 60), beats()(1)[0] | {"count": 7}
    found = {second: judge.look({0: beat | {"beat": second}}, float(second)) for second in range(1, 100)}
    assert found[12] == "nothing has moved for 11 s, at step 1, forward; timeout=... gives a step more time"


def test_a_single_process_that_hangs() -> None:
    judge, beat = Judge(1, 10), {"step": 7, "begun": 7, "count": 21, "what": "its data", "collective": "none"}
    beat["patient"] = False
    said = {second: judge.look({0: beat | {"beat": second}}, float(second)) for second in range(1, 20)}
    assert min(second for second, text in said.items() if text) == 12
    assert said[12].startswith("nothing has moved for 11 s, at step 7, its data; timeout=")


def test_while_rank_0_works_alone_nothing_has_to_move() -> None:
    stuck = {"count": lambda s: min(s, 20)}
    assert verdicts(beats(r0=stuck | {"patient": lambda s: s > 5}, r1=stuck, r2=stuck), 100) == {}


def test_a_machine_that_slept_accuses_nobody() -> None:
    judge, at = Judge(3, 10), beats()
    assert judge.look(at(1), 1) == judge.look(at(2), 2) == ""
    assert judge.look(at(2), 3000) == "", "all ranks were stopped, this one too"
    assert judge.look(at(3), 3001) == ""


@pytest.mark.parametrize("pause", [55, 65, 115, 130, 250])
def test_a_pause_of_all_ranks_accuses_nobody(pause: int) -> None:
    """However long it is, and though the others wake a little later."""
    judge, at = Judge(3, 600), beats()
    assert judge.look(at(1), 1) == judge.look(at(2), 2) == ""
    for second in range(5):
        assert judge.look(at(2), 2 + pause + second) == ""
    assert judge.look(at(3), 7 + pause) == ""


def test_a_rank_that_has_left_is_not_missed() -> None:
    left = {"beat": lambda s: s if s < 10 else -1}
    assert verdicts(beats(r1=left), 40) == {}


def test_ranks_that_are_all_at_the_same_place_accuse_none_of_them() -> None:
    stuck = {
        "count": lambda s: min(4 * s, 80),
        "step": lambda s: min(s, 20),
        "collective": lambda s: "all_reduce of [5]",
    }
    said = verdicts(beats(r0=stuck, r1=stuck, r2=stuck), 40)
    assert said[31] == (
        "nothing has moved for 11 s: all ranks are at step 20, forward, last collective all_reduce of [5]; they wait "
        "in that collective, or for their devices; timeout=... gives a step more time"
    )
    stuck |= {"what": lambda s: "its data"}
    assert "; they wait for their data; " in verdicts(beats(r0=stuck, r1=stuck, r2=stuck), 40)[31]


def test_a_rank_that_has_left_is_what_the_others_wait_for() -> None:
    stuck = {"count": lambda s: min(4 * s, 80), "step": lambda s: min(s, 20)}
    left = stuck | {"beat": lambda s: s if s < 10 else -1}
    said = verdicts(beats(r0=stuck, r1=left, r2=stuck), 40)
    assert said[31] == "nothing has moved for 11 s: rank 1 has left, at step 20, forward; rank 0 is at step 20, forward"


class Counted:
    """A store that counts the keys that are asked for."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.keys = store, 0

    def set(self, key: str, value: str) -> None:
        self.keys += 1
        self._store.set(key, value)

    def check(self, keys: list[str]) -> bool:
        self.keys += len(keys)
        return self._store.check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.keys += len(keys)
        return self._store.multi_get(keys)


class Posts:
    """That many ranks' parts in the watch, on one real store; a second of theirs takes none of ours."""

    def __init__(self, count: int, limit: float = 10) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        clients = [dist.TCPStore("127.0.0.1", self.server.port, is_master=False) for _ in range(min(count, 8))]
        self.stores = [Counted(dist.PrefixStore("watch", clients[rank % len(clients)])) for rank in range(count)]
        self.posts = [Post(self.stores[rank], rank, count, limit, 3) for rank in range(count)]
        self.ended: dict[int, str] = {}

    def seconds(
        self, seconds: range, silent: int | None = None, left: tuple[int, ...] = (), moves: bool = True
    ) -> None:
        """One turn a second of each rank that is neither silent, nor has left before, nor has ended."""
        for second in seconds:
            for rank, post in enumerate(self.posts):
                if rank == silent or rank in self.ended or (rank in left and second > seconds[0]):
                    continue
                beat = -1 if rank in left else second
                place = {"step": second if moves else 7, "count": second if moves else 7, "what": "forward", "begun": 9}
                said = post.turn(place | {"beat": beat, "collective": "none", "patient": False}, float(second))
                if said:
                    self.ended[rank] = said


def test_a_rank_of_256_is_silent() -> None:
    """Rank 0 finds it, the others read it of rank 0; what the store is asked grows as the number of ranks."""
    world = Posts(256)
    world.seconds(range(1, 5))
    before = [store.keys for store in world.stores]
    world.seconds(range(5, 10))
    asked = [(store.keys - then) / 5 for store, then in zip(world.stores, before, strict=True)]
    assert asked[0] == 256 and set(asked[1:]) == {2}, "a second"
    world.seconds(range(10, 30), silent=200)
    assert world.ended.keys() == set(range(256)) - {200}
    assert set(world.ended.values()) == {"rank 200 has been silent for 11 s; last seen at step 9, forward"}


def test_rank_0_of_256_is_silent() -> None:
    world = Posts(256)
    world.seconds(range(1, 5))
    world.seconds(range(5, 20), silent=0)
    assert world.ended.keys() == set(range(1, 256))
    assert set(world.ended.values()) == {"rank 0 has been silent for 11 s; last seen at step 4, forward"}


@pytest.mark.parametrize("late", [0, 9])
def test_a_rank_that_never_began_holds_up_none_that_did(late: int) -> None:
    world = Posts(16)
    world.seconds(range(1, 20), silent=late)
    assert len(world.ended) == 15 and set(world.ended.values()) == {
        f"rank {late} has been silent for 11 s; it never began"
    }


def test_256_ranks_that_go_nowhere() -> None:
    world = Posts(256)
    world.seconds(range(1, 20), moves=False)
    assert len(world.ended) == 256
    assert set(world.ended.values()) == {
        "nothing has moved for 11 s: all ranks are at step 7, forward; they wait for their devices; timeout=... gives "
        "a step more time"
    }


def test_when_rank_0_has_left_the_next_one_judges() -> None:
    world = Posts(16)
    world.seconds(range(1, 4))
    world.seconds(range(4, 8), left=(0, 1))
    assert world.ended == {} and [post.judges for post in world.posts[2:]] == [True] + [False] * 13
    before = [store.keys for store in world.stores]
    world.ended = {0: "left", 1: "left"}
    world.seconds(range(8, 30), silent=5)
    named = {said for rank, said in world.ended.items() if rank > 1}
    assert world.ended.keys() == set(range(16)) - {5}
    assert named == {"rank 5 has been silent for 11 s; last seen at step 7, forward"}
    assert world.stores[3].keys - before[3] < 3 * 12


def test_what_is_suspected_reaches_all_ranks_before_the_verdict() -> None:
    """A collective that breaks when a rank dies is reported with its name within a few heartbeats."""
    world = Posts(8)
    world.seconds(range(1, 5))
    world.seconds(range(5, 10), silent=6)
    assert world.ended == {}
    assert {post.suspect(9.0) for rank, post in enumerate(world.posts) if rank != 6} == {
        "rank 6 has been silent for 4 s; last seen at step 4, forward"
    }


def test_a_killed_decoding_process_is_not_taken_for_a_lost_rank() -> None:
    error = RuntimeError("DataLoader worker has left: [Errno 104] Connection reset by peer")
    with pytest.raises(RuntimeError, match="DataLoader worker"), watching(60):
        raise error
