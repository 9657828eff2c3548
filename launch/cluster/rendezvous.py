"""Before the ranks of several nodes start: rank 0's node chooses a port, and every node shows that it reaches it.

torch would wait for minutes and then name ranks; this names the node that is amiss.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

REACH = 30.0  # seconds in which a node must reach the first, at most half of those in which they meet
HEED = 2.0  # seconds by which SLURM's word to stop may come to one node later than to the first


def host(
    file: Path, address: str, port: int, nodes: list[str], seconds: float, stop: Callable[[], bool]
) -> socket.socket:
    """On rank 0: publish the port, or a free one if it is taken, in the file, and wait for the other nodes.

    nodes  names of all, rank 0's own first
    stop   tells whether to give up, with ConnectionAbortedError

    Returns a socket that holds the port until it is closed: others are not given it, and torch, which says that it
    shares it (SO_REUSEADDR), can listen there. Raises ConnectionError naming the nodes that did not come.
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
    """Until all are there, and have been told so: by "go", and in the file of that name; closes the server."""
    with server, ExitStack() as guests:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"address": address, "port": port}))
        temporary.replace(file)
        missing, end, came = set(nodes[1:]), time.monotonic() + seconds, []
        while missing:
            _check(stop)
            if time.monotonic() > end:
                names = ", ".join(sorted(missing)[:8]) + " ..." * (len(missing) > 8)
                raise ConnectionError(
                    f"{names} did not come to {address}:{port} within {seconds:.0f} s: the log of its first rank, or "
                    f"`scontrol show node {min(missing)}`, may say why; exclude={min(missing)} does without it"
                )
            try:
                guest = guests.enter_context(server.accept()[0])
                guest.settimeout(5)
                name = guest.recv(256).decode(errors="replace")
            except OSError:  # nobody came in this half second, or one that left again
                continue
            if name in nodes[1:]:
                missing.discard(name)
                came.append(guest)
            else:
                guest.close()
        server.close()  # before anyone is told: what a rank then starts is to wait for torch's
        for guest in came:
            with suppress(OSError):  # it will be missed by the process group
                guest.sendall(b"go")
        _go_file(file).touch()
        end = time.monotonic() + 5
        for guest in came:
            guest.settimeout(max(0.01, end - time.monotonic()))
            with suppress(OSError):
                guest.recv(1)  # the guest closes first, so that no half-closed connection blocks the port


def join(file: Path, node: str, connect: bool, seconds: float, stop: Callable[[], bool]) -> tuple[str, int]:
    """On all other ranks: the address and port of rank 0, once all nodes are there; one rank of each node connects.

    Raises ConnectionError naming this node and what it can't do, before rank 0 gives up and all are ended: a firewall
    that drops packets would else be told of by nobody. The seconds count anew once rank 0 has begun to wait.
    """
    unseen = (
        f"{node} did not see {file} within {seconds:.0f} s: rank 0 has not started, or run_dir is not on a file system "
        "that all nodes share"
    )
    _await_file(file, seconds, unseen, stop)
    meeting = json.loads(file.read_text())
    address, port = str(meeting["address"]), int(meeting["port"])
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConnectionError(
            f"{node} can't resolve {address}, the name of the first node ({error.strerror or error}): the cluster's "
            f"DNS or /etc/hosts must know it; exclude={node} does without this node"
        ) from error
    go = _go_file(file)
    late = (
        f"{node} was not told by {f'{address}:{port}' if connect else go} within {seconds:.0f} s that all nodes are "
        "there: the first node's log may say which did not come"
    )
    if not connect:
        _await_file(go, seconds, late, stop)
        return address, port
    with _reach(address, port, node, min(REACH, seconds / 2), stop) as server:
        end, told = time.monotonic() + seconds, None
        while told is None:
            _check(stop)
            if time.monotonic() > end:
                raise ConnectionError(late)
            told = _receive(server)
    if told != b"go":
        _heed(stop)
        raise ConnectionError(
            f"{node} has lost the first node, {address}:{port}, before all nodes were there: the first node's log may "
            "say why"
        )
    return address, port


def _reach(address: str, port: int, node: str, seconds: float, stop: Callable[[], bool]) -> socket.socket:
    """A connection to rank 0 which knows this node's name; ConnectionError if there is none in these seconds."""
    end = time.monotonic() + seconds
    while True:
        _check(stop)
        try:
            server = socket.create_connection((address, port), timeout=min(5, seconds))
        except OSError as error:
            if time.monotonic() > end:
                _check(stop)
                raise ConnectionError(
                    f"{node} can't reach the first node at {address}:{port} ({error.strerror or error}): the first "
                    "node's log may say why; else a firewall is between them, or the name means another network"
                ) from error
            time.sleep(0.2)
            continue
        with suppress(OSError):  # what is received tells
            server.sendall(node.encode())
        return server


def _receive(server: socket.socket) -> bytes | None:
    """What rank 0 says: nothing if it has closed; None if it is silent for half a second."""
    server.settimeout(0.5)
    try:
        return server.recv(2)
    except TimeoutError:
        return None
    except OSError:
        return b""


def _heed(stop: Callable[[], bool]) -> None:
    """Rank 0 has closed: perhaps it was told to stop, and this node is about to be."""
    end = time.monotonic() + HEED
    while time.monotonic() < end:
        _check(stop)
        time.sleep(0.1)


def _go_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.go")


def _await_file(file: Path, seconds: float, late: str, stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        _check(stop)
        if time.monotonic() > end:
            raise ConnectionError(late)
        time.sleep(0.2)
        with suppress(OSError), os.scandir(file.parent):  # opened, NFS looks again; else it may not for a minute
            pass


def _listen(port: int) -> tuple[socket.socket, socket.socket]:
    """A socket that holds that port, or any free one, and another that listens there."""
    both = socket.has_dualstack_ipv6()
    for attempt in (port, 0):
        held = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
        try:
            if both:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            held.bind(("", attempt))  # unshared, as another meeting may hold it that does not listen yet
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
        raise ConnectionAbortedError("told to stop")
