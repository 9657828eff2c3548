"""Before the ranks of several nodes start: rank 0's node chooses a port, and every node shows that it reaches it.

torch would wait for minutes and then name ranks; this names the node that is amiss.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

REACH = 30.0  # seconds in which a node must reach the first, at most half of those in which they meet


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
    """Until all are there, and have been told so; closes the server."""
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
                missing.discard(guest.recv(256).decode(errors="replace"))
                came.append(guest)
            except OSError:  # nobody came in this half second, or one that left again
                continue
        for guest in came:
            _say_go(guest)


def join(file: Path, node: str, connect: bool, seconds: float, stop: Callable[[], bool]) -> tuple[str, int]:
    """On all other ranks: the address and port of rank 0; one rank of each node connects, and waits for the others.

    Raises ConnectionError naming this node and what it can't do, before rank 0 gives up and all are ended: a firewall
    that drops packets would else be told of by nobody.
    """
    end = time.monotonic() + seconds
    while not file.exists():
        _check(stop)
        if time.monotonic() > end:
            raise ConnectionError(
                f"{node} did not see {file} within {seconds:.0f} s: rank 0 has not started, or run_dir is not on a "
                "file system that all nodes share"
            )
        time.sleep(0.2)
    meeting = json.loads(file.read_text())
    address, port = str(meeting["address"]), int(meeting["port"])
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConnectionError(
            f"{node} can't resolve {address}, the name of the first node ({error.strerror or error}): the cluster's "
            f"DNS or /etc/hosts must know it; exclude={node} does without this node"
        ) from error
    reach = min(REACH, seconds / 2)
    last = time.monotonic() + reach
    while connect:
        _check(stop)
        reached = False
        try:
            with socket.create_connection((address, port), timeout=min(5, reach)) as server:
                reached = True
                server.sendall(node.encode())
                server.settimeout(max(1.0, end - time.monotonic()))
                if server.recv(2) == b"go":
                    break
            raise ConnectionResetError("closed by the first node")
        except OSError as error:
            if time.monotonic() > (end if reached else last) or isinstance(error, ConnectionResetError):
                raise ConnectionError(
                    f"{node} can't reach the first node at {address}:{port} ({error.strerror or error}): the first "
                    "node's log may say why; else a firewall is between them, or the name means another network"
                ) from error
            time.sleep(0.2)
    return address, port


def _listen(port: int) -> tuple[socket.socket, socket.socket]:
    """A socket that holds that port, or any free one, and another that listens there."""
    both = socket.has_dualstack_ipv6()
    for attempt in (port, 0):
        held = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if both:
                held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            held.bind(("", attempt))
            address = ("", held.getsockname()[1])
            return held, socket.create_server(address, family=held.family, dualstack_ipv6=both, backlog=1024)
        except OSError:
            held.close()
            if attempt == 0:
                raise
    raise AssertionError


def _say_go(guest: socket.socket) -> None:
    try:
        guest.sendall(b"go")
        guest.recv(1)  # the guest closes first, so that no half-closed connection blocks the port
    except OSError:  # it will be missed by the process group
        pass


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise ConnectionAbortedError("told to stop")
