"""The nodes of a job meet: ports, signals, firewalls, names that do not resolve."""

import json
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from launch.cluster import rendezvous

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def go_on() -> bool:
    return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def test_the_nodes_meet(tmp_path: Path) -> None:
    found = []
    guests = [
        threading.Thread(target=lambda c=c: found.append(rendezvous.join(tmp_path / "m", "node2", c, 10, go_on)))
        for c in (True, False)
    ]
    for guest in guests:
        guest.start()
    port = free_port()
    held = rendezvous.host(tmp_path / "m", "localhost", port, ["node1", "node2"], 10, go_on)
    for guest in guests:
        guest.join()
    assert found == [("localhost", port)] * 2
    with held, pytest.raises(OSError, match="in use"), socket.socket(held.family) as other:
        other.bind(("", port))  # as the kernel does for who wants any port
    with socket.create_server(("", port)):
        pass  # it is free again


def test_torch_listens_at_the_port_that_is_held(tmp_path: Path) -> None:
    with rendezvous.host(tmp_path / "m", "localhost", free_port(), ["node1"], 10, go_on) as held:
        port = held.getsockname()[1]
        store = torch.distributed.TCPStore("localhost", port, 1, is_master=True)
        store.set("a", "b")
        assert store.port == port and store.get("a") == b"b"


def test_a_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with rendezvous.host(tmp_path / "m", "localhost", port, ["node1"], 10, go_on) as held:
            other = held.getsockname()[1]
    assert other != port
    assert rendezvous.join(tmp_path / "m", "node1", False, 10, go_on) == ("localhost", other)


def test_two_meetings_on_one_machine(tmp_path: Path) -> None:
    port = free_port()
    with (
        rendezvous.host(tmp_path / "m", "localhost", port, ["node1"], 10, go_on) as one,
        rendezvous.host(tmp_path / "n", "localhost", port, ["node1"], 10, go_on) as other,
    ):
        assert one.getsockname()[1] == port != other.getsockname()[1]


def test_no_rank_goes_on_before_all_nodes_are_there(tmp_path: Path) -> None:
    """Ranks other than the first of their node neither connect nor go on to torch, whose own limit would count."""
    met: list[float] = []

    def join(node: str, connect: bool) -> None:
        rendezvous.join(tmp_path / "m", node, connect, 20, go_on)
        met.append(time.monotonic())

    others = [threading.Thread(target=join, args=(node, False)) for node in ("node1", "node2", "node2")]
    last = threading.Timer(2, join, ("node2", True))
    begin = time.monotonic()
    for thread in (*others, last):
        thread.start()
    rendezvous.host(tmp_path / "m", "localhost", free_port(), ["node1", "node2"], 20, go_on).close()
    for thread in (*others, last):
        thread.join()
    assert len(met) == 4 and begin + 2 < min(met) and max(met) < begin + 19


def test_a_rank_that_is_not_told_to_go(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"address": "localhost", "port": 1}')
    with pytest.raises(
        ConnectionError, match=r"^node2 got no message from /.*/m\.go within 1 s that all nodes have met; "
    ):
        rendezvous.join(tmp_path / "m", "node2", False, 1, go_on)
    with pytest.raises(ConnectionAbortedError):
        rendezvous.join(tmp_path / "m", "node2", False, 60, lambda: True)


def connect_to(file: Path, *first_bytes: bytes) -> list[socket.socket]:
    """Connections to a meeting that begins at any time, one for each that is said in them."""
    while not file.exists():
        time.sleep(0.05)
    address = json.loads(file.read_text())
    guests = [socket.create_connection((address["address"], address["port"]), timeout=10) for _ in first_bytes]
    for guest, said in zip(guests, first_bytes, strict=True):
        guest.sendall(said)
    return guests


def test_guests_that_are_no_nodes_delay_nobody(tmp_path: Path) -> None:
    strangers: list[socket.socket] = []

    def come() -> None:
        strangers.extend(connect_to(tmp_path / "m", *[b"\x00:\x91<"] * 3))
        rendezvous.join(tmp_path / "m", "node2", True, 20, go_on)

    thread = threading.Thread(target=come)
    begin = time.monotonic()
    thread.start()
    with rendezvous.host(tmp_path / "m", "localhost", free_port(), ["node1", "node2"], 20, go_on) as held:
        assert time.monotonic() < begin + 19
        torch.distributed.TCPStore("localhost", held.getsockname()[1], 1, is_master=True)
    thread.join()
    for stranger in strangers:
        assert stranger.recv(2) == b"", "it was not told to go"
        stranger.close()


def test_a_guest_that_does_not_close_delays_no_other(tmp_path: Path) -> None:
    spoken: list[float] = []
    over = threading.Event()

    def come() -> None:
        guests = connect_to(tmp_path / "m", b"node2", b"node3", b"node4")
        for guest in guests:
            assert guest.recv(2) == b"go"
            spoken.append(time.monotonic())
        with pytest.raises(OSError, match="refused"):  # torch's clients try again; they would wait in an open one
            connect_to(tmp_path / "m", b"torch")
        spoken.append(time.monotonic())
        over.wait(30)
        for guest in guests:
            guest.close()

    thread = threading.Thread(target=come)
    begin = time.monotonic()
    thread.start()
    nodes = ["node1", "node2", "node3", "node4"]
    rendezvous.host(tmp_path / "m", "localhost", free_port(), nodes, 20, go_on).close()
    took = time.monotonic() - begin
    over.set()
    thread.join()
    assert took < 14, "5 s for all, not for each"
    assert len(spoken) == 4 and spoken[-1] < begin + took, "before it has waited for them to close"


def test_a_node_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"^node2, node3 did not connect to node1:"):
        rendezvous.host(tmp_path / "m", "node1", 0, ["node1", "node2", "node3"], 1, go_on)


def test_a_name_that_does_not_resolve(tmp_path: Path) -> None:
    rendezvous.host(tmp_path / "m", "nowhere.invalid", 0, ["node1"], 1, go_on).close()
    with pytest.raises(ConnectionError, match=r"^node2 can't resolve nowhere.invalid"):
        rendezvous.join(tmp_path / "m", "node2", True, 1, go_on)


def test_a_port_that_is_blocked(tmp_path: Path) -> None:
    rendezvous.host(tmp_path / "m", "localhost", free_port(), ["node1"], 1, go_on).close()
    with pytest.raises(
        ConnectionError, match=r"^node2 can't reach the first node at localhost:\d+ \(Connection refused"
    ):
        rendezvous.join(tmp_path / "m", "node2", True, 1, go_on)


def test_a_firewall_that_drops_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose queue is full drops them, too: the node tells of it long before the nodes' time is over."""
    monkeypatch.setattr(rendezvous, "REACH", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.socket() as first, socket.socket() as next:
        port = server.getsockname()[1]
        for filling in (first, next):
            filling.setblocking(False)
            filling.connect_ex(("127.0.0.1", port))
        (tmp_path / "m").write_text(f'{{"address": "127.0.0.1", "port": {port}}}')
        begin = time.monotonic()
        with pytest.raises(
            ConnectionError, match=rf"^node2 can't reach the first node at 127.0.0.1:{port} \(timed out"
        ):
            rendezvous.join(tmp_path / "m", "node2", True, 60, go_on)
    assert time.monotonic() < begin + 40


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"^node2 did not see .* a file system that all nodes share"):
        rendezvous.join(tmp_path / "m", "node2", True, 1, go_on)


def test_told_to_stop_while_the_others_are_awaited(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConnectionAbortedError):
        rendezvous.host(tmp_path / "m", "node1", 0, ["node1", "node2"], 60, lambda: time.monotonic() > begin + 1)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (20, 1)], ids=["first-node-told-first", "guest-told-first"])
def test_told_to_stop_while_three_nodes_meet(first: float, second: float, tmp_path: Path) -> None:
    """The first node's closing comes to a guest as an error, before or after its own signal."""
    begin, nodes = time.monotonic(), ["node1", "node2", "node3"]
    raised: list[BaseException] = []
    ended: list[float] = []

    def join() -> None:
        try:
            rendezvous.join(tmp_path / "m", "node2", True, 60, lambda: time.monotonic() > begin + second)
        except OSError as error:
            raised.append(error)
        ended.append(time.monotonic())

    thread = threading.Thread(target=join)
    thread.start()
    with pytest.raises(ConnectionAbortedError):
        rendezvous.host(
            tmp_path / "m", "localhost", 0, nodes, 60, lambda: bool(ended) or time.monotonic() > begin + first
        )
    thread.join()
    assert [type(error) for error in raised] == [ConnectionAbortedError] and ended[0] < begin + 30


def test_the_first_node_ends_while_the_others_are_awaited(tmp_path: Path) -> None:
    """Nobody is told to stop: it is an error, of which the first node's log says more."""
    found: list[str] = []

    def join() -> None:
        with pytest.raises(ConnectionError, match=r"^node2 lost the first node, localhost:\d+, before ") as error:
            rendezvous.join(tmp_path / "m", "node2", True, 60, go_on)
        found.append(str(error.value))

    thread = threading.Thread(target=join)
    thread.start()
    with pytest.raises(ConnectionError, match=r"^node3 did not connect"):
        rendezvous.host(tmp_path / "m", "localhost", 0, ["node1", "node2", "node3"], 2, go_on)
    thread.join()
    assert found


def test_seconds_for_which_the_job_is_suspended_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on meanwhile; it jumps by an hour while a node waits for the first one."""
    begin, jumps = time.monotonic(), iter([0.0])
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + next(jumps, 3600.0))
    rank = threading.Thread(
        target=lambda: rendezvous.host(tmp_path / "m", "localhost", 0, ["node1"], 60, go_on).close()
    )
    threading.Timer(0.5, rank.start).start()
    assert rendezvous.join(tmp_path / "m", "node1", False, 30, go_on)[0] == "localhost"
    assert clock() - begin < 20
    countdown = rendezvous.Countdown(0.05)
    time.sleep(0.06)
    assert countdown.is_over()
