"""Ranks that die, stand still or fall out of step are told apart, by name and within the limit."""

from typing import Any

from simclr_ddp.watch import Judge


def beats(**changes: dict[str, Any]) -> Any:
    """A world of three ranks: beats(r1={"beat": None}) etc. change what rank 1 says."""

    def at(second: int) -> dict[int, dict[str, Any]]:
        told: dict[int, dict[str, Any]] = {}
        for rank in range(3):
            own = {"beat": second, "step": second, "count": 4 * second, "what": "forward", "patient": False}
            own["collective"] = "barrier" if rank == 2 else "none"
            told[rank] = own | {k: f(second) for k, f in changes.get(f"r{rank}", {}).items()}
        return told

    return at


def verdicts(at: Any, seconds: int, limit: float = 10) -> dict[int, str]:
    judge = Judge(3, limit)
    told = {second: judge.look(at(second), float(second)) for second in range(1, seconds)}
    return {second: text for second, text in told.items() if text}


def test_nothing_is_told_of_ranks_that_go_on() -> None:
    assert verdicts(beats(), 100) == {}
    slow = {"count": lambda s: s // 9, "step": lambda s: s // 9}
    assert verdicts(beats(r0=slow, r1=slow, r2=slow), 100) == {}, "a step may take nearly as long as the limit"


def test_a_silent_rank_is_named_with_its_place() -> None:
    frozen = {"beat": lambda s: min(s, 20), "step": lambda s: min(s, 20), "what": lambda s: "its data"}
    told = verdicts(beats(r2=frozen), 35)
    assert (
        min(told) == 31
        and told[31] == "rank 2 has been silent for 11 s; last seen at step 20, its data, last collective barrier"
    )


def test_a_rank_that_pauses_for_less_than_the_limit_is_forgiven() -> None:
    pause = {"beat": lambda s: s if s < 20 or s > 28 else 20}
    assert verdicts(beats(r1=pause), 60) == {}


def test_a_rank_that_never_began() -> None:
    def at(second: int) -> dict[int, dict[str, Any]]:
        return {rank: beat for rank, beat in beats()(second).items() if rank != 1}

    told = verdicts(at, 15)
    assert min(told) == 12 and told[12].startswith("rank 1 has been silent") and "never began" in told[12]


def test_ranks_that_wait_for_each_other_for_ever() -> None:
    """All threads beat, no rank moves: the one that is behind is named."""
    stuck = {"count": lambda s: min(4 * s, 80), "step": lambda s: min(s, 20)}
    behind = {"count": lambda s: min(4 * s, 77), "step": lambda s: min(s, 19), "what": lambda s: "its data"}
    told = verdicts(beats(r0=stuck, r1=behind, r2=stuck), 40)
    assert min(told) == 31
    assert told[31] == (
        "nothing has moved for 11 s: rank 1 is behind, at step 19, its data; rank 0 is at step 20, forward"
    )


def test_a_process_alone_that_stands_still() -> None:
    judge, beat = Judge(1, 10), {"step": 7, "count": 21, "what": "its data", "collective": "none", "patient": False}
    told = {second: judge.look({0: beat | {"beat": second}}, float(second)) for second in range(1, 20)}
    assert min(second for second, text in told.items() if text) == 12
    assert told[12].startswith("nothing has moved for 11 s, at step 7, its data; timeout=")


def test_while_rank_0_works_alone_nothing_has_to_move() -> None:
    stuck = {"count": lambda s: min(s, 20)}
    assert verdicts(beats(r0=stuck | {"patient": lambda s: s > 5}, r1=stuck, r2=stuck), 100) == {}


def test_a_machine_that_slept_accuses_nobody() -> None:
    judge, at = Judge(3, 10), beats()
    assert judge.look(at(1), 1) == judge.look(at(2), 2) == ""
    assert judge.look(at(2), 3000) == "", "all ranks were stopped, this one too"
    assert judge.look(at(3), 3001) == ""


def test_a_rank_that_has_left_is_not_missed() -> None:
    left = {"beat": lambda s: s if s < 10 else -1}
    assert verdicts(beats(r1=left), 40) == {}
