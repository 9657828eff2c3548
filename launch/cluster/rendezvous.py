"""Before the ranks of several nodes start, rank 0's node chooses a port, and every node checks that it reaches it.

torch would wait for minutes and then name ranks; this names the node that has the problem.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

REACH = 30.0  # seconds in which a node must reach the first one; at most half of the time in which all must meet
LATER = 2.0  # seconds by which a signal of SLURM may reach one node later than the first


class Countdown:
    """Counts down the seconds in which this process runs; those for which the job is suspended do not count."""

    LOOKS = 10.0  # more seconds between two looks than that were a suspension

    def __init__(self, seconds: float) -> None:
        self._left, self._last = seconds, time.monotonic()

    def is_over(self) -> bool:
        """To be called every few seconds."""
        now = time.monotonic()
        self._left -= min(now - self._last, self.LOOKS)
        self._last = now
        return self._left <= 0


def host(
    file: Path, address: str, port: int, nodes: list[str], seconds: float, stop: Callable[[], bool]
) -> socket.socket:
    """On rank 0: write the port, or a free one if it is taken, to the file, and wait for the other nodes.

    nodes  names of all nodes, rank 0's first
    stop   returns whether to give up, with ConnectionAbortedError

    Returns a socket that holds the port until it is closed: nobody else is assigned it, and torch, which sets
    SO_REUSEADDR, can listen there. Raises ConnectionError naming the nodes that did not come.
    """
    held, server = _listen(port)
    try:
        _await_nodes(server, file, address, nodes, seconds, stop)
    except BaseException:
        held.close()
        raise
    return held


def _await_nodes(
    server: socket.socket, file: Path, address: str, nodes: list[str], seconds: float, stop: Callable[[], bool]
) -> None:
    """Wait for all nodes, then notify them by "go" and by the file of that name; closes the server."""
    with server, ExitStack() as guests:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"address": address, "port": port}))
        temporary.replace(file)
        missing, end, came = set(nodes[1:]), Countdown(seconds), []
        while missing:
            _check(stop)
            if end.is_over():
                names = ", ".join(sorted(missing)[:8]) + " ..." * (len(missing) > 8)
                raise ConnectionError(
                    f"{names} did not connect to {address}:{port} within {seconds:.0f} s; see the log of its first "
                    f"rank and `scontrol show node {min(missing)}`, or set exclude={min(missing)}"
                )
            try:
                guest = guests.enter_context(server.accept()[0])
                guest.settimeout(5)
                name = guest.recv(256).decode(errors="replace")
            except OSError:  # nobody connected in this half second, or left again
                continue
            if name in nodes[1:]:
                missing.discard(name)
                came.append(guest)
            else:
                guest.close()
        server.close()  # first: a rank that is notified connects to torch's server at this port
        for guest in came:
            with suppress(OSError):  # the process group will report that it is gone
                guest.sendall(b"go")
        _go_file(file).touch()
        until = time.monotonic() + 5
        for guest in came:
            guest.settimeout(max(0.01, until - time.monotonic()))
            with suppress(OSError):
                guest.recv(1)  # the guest closes first, so that no half-closed connection blocks the port


def join(file: Path, node: str, connect: bool, seconds: float, stop: Callable[[], bool]) -> tuple[str, int]:
    """On all other ranks: the address and port of rank 0, once all nodes are there; one rank of each node connects.

    Raises ConnectionError naming this node and the problem before rank 0 gives up and ends all ranks, since nobody else
    could report a firewall that drops packets. The seconds start again once rank 0 waits.
    """
    unseen = (
        f"{node} did not see {file} within {seconds:.0f} s: rank 0 has not started, or the file system is not shared; "
        "choose a run_dir on a file system that all nodes share"
    )
    _await_file(file, seconds, unseen, stop)
    meeting = json.loads(file.read_text())
    address, port = str(meeting["address"]), int(meeting["port"])
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConnectionError(
            f"{node} can't resolve {address}, the name of the first node ({error.strerror or error}); add it to the "
            f"cluster's DNS or /etc/hosts, or set exclude={node}"
        ) from error
    go = _go_file(file)
    late = (
        f"{node} got no message from {f'{address}:{port}' if connect else go} within {seconds:.0f} s that all nodes "
        "have met; see the first node's log"
    )
    if not connect:
        _await_file(go, seconds, late, stop)
        return address, port
    with _reach(address, port, node, min(REACH, seconds / 2), stop) as server:
        end, received = Countdown(seconds), None
        while received is None:
            _check(stop)
            if end.is_over():
                raise ConnectionError(late)
            received = _receive(server)
    if received != b"go":
        end = Countdown(LATER)
        while not end.is_over():  # rank 0 has closed: perhaps for a signal that this node is about to get
            _check(stop)
            time.sleep(0.1)
        raise ConnectionError(
            f"{node} lost the first node, {address}:{port}, before all nodes had met; see the first node's log"
        )
    return address, port


def _reach(address: str, port: int, node: str, seconds: float, stop: Callable[[], bool]) -> socket.socket:
    """A connection to rank 0, which knows this node's name; ConnectionError if it takes longer."""
    end = Countdown(seconds)
    while True:
        _check(stop)
        try:
            server = socket.create_connection((address, port), timeout=min(5, seconds))
        except OSError as error:
            if end.is_over():
                _check(stop)
                raise ConnectionError(
                    f"{node} can't reach the first node at {address}:{port} ({error.strerror or error}); see the first "
                    "node's log, or check for a firewall between them and for another network behind that name"
                ) from error
            time.sleep(0.2)
            continue
        with suppress(OSError):  # then nothing is received
            server.sendall(node.encode())
        return server


def _receive(server: socket.socket) -> bytes | None:
    """What rank 0 sends: empty if it has closed, None if it is silent for half a second."""
    server.settimeout(0.5)
    try:
        return server.recv(2)
    except TimeoutError:
        return None
    except OSError:
        return b""


def _go_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.go")


def _await_file(file: Path, seconds: float, late: str, stop: Callable[[], bool]) -> None:
    end = Countdown(seconds)
    while not file.exists():
        _check(stop)
        if end.is_over():
            raise ConnectionError(late)
        time.sleep(0.2)
        with suppress(OSError), os.scandir(file.parent):  # makes NFS look again; it may not for a minute
            pass


def _listen(port: int) -> tuple[socket.socket, socket.socket]:
    """(a socket that holds that port, or any free one; another that listens there)"""
    both = socket.has_dualstack_ipv6()
    for attempt in (port, 0):
        held = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
        try:
            if both:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            held.bind(("", attempt))  # unshared: another job may hold it and not listen yet
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            address = ("", held.getsockname()[1])
            return held, socket.create_server(address, family=held.family, dualstack_ipv6=both, backlog=1024)
        except OSError:
            held.close()
            if attempt == 0:
                raise
    raise AssertionError


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise ConnectionAbortedError("stopped by a signal")
