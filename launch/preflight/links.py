"""Links between nodes and their clocks, over plain TCP: one process per node asks its partners."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from statistics import median

import torch.distributed as dist

from launch.preflight.facts import NodeFacts

LINK_BYTES = 4 << 20
_SLOW_NODE = 0.5  # a node whose best link in is below this share of the median over the nodes is named
_SLOW_LINK = 0.2  # a link below this share of the median over the links is named
_MOST_SKEW = 1.0  # seconds
_ALL_PAIRS = 16  # up to so many nodes every link is measured; then of each node those to 1, 2, 4, 8, ... nodes on
_DEAD = -1.0


def check_links(facts: Sequence[NodeFacts], rank: int, store: dist.Store, deadline: float) -> dict[str, list[float]]:
    """What this rank's node measures of its partners, if it is the first rank of its node.

    Args:
        facts: of every rank. store: of the job. deadline: on time.monotonic()'s clock.

    Returns:
        By node label bytes per second that this node sends there (negative where nothing got through), and seconds
        by which the clock there is ahead. Empty on other ranks.
    """
    leaders = list({fact.label: fact for fact in reversed(facts)}.values())[::-1]
    ranks = [leader.rank for leader in leaders]
    if rank not in ranks or len(leaders) == 1:
        return {}
    server = socket.create_server(("", 0))
    stop = threading.Event()
    threading.Thread(target=_serve, args=(server, stop), daemon=True).start()
    store.set(f"preflight/port/{rank}", str(server.getsockname()[1]))
    measured = {}
    own, count = ranks.index(rank), len(leaders)
    # A slow link also slows down what comes back over it: the lower node measures first, then the higher one. Nobody
    # waits before it is done with all higher ones.
    for partner in sorted(partners(own, count), key=lambda other: (other < own, other)):
        leader = leaders[partner]
        if partner < own and own in partners(partner, count):
            left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
            with suppress(dist.DistStoreError):
                store.wait([f"preflight/measured/{leader.rank}/{rank}"], left)
        store.wait([f"preflight/port/{leader.rank}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        port = int(store.get(f"preflight/port/{leader.rank}"))
        measured[leader.label] = list(_measure(leader.address, port))
        store.set(f"preflight/measured/{rank}/{leader.rank}", "1")
    store.set(f"preflight/linked/{rank}", "1")
    store.wait([f"preflight/linked/{other}" for other in ranks], timedelta(seconds=20))
    stop.set()
    server.close()
    return measured


def partners(own: int, count: int) -> list[int]:
    """The nodes, by number, that node `own` of `count` measures: the first one, for its clock, always among them."""
    steps = range(1, count) if count <= _ALL_PAIRS else [1 << bit for bit in range((count - 1).bit_length())]
    chosen = dict.fromkeys((own + step) % count for step in steps)
    return [node for node in (chosen if own == 0 else {**chosen, 0: None}) if node != own]


def _measure(address: str, port: int) -> tuple[float, float]:
    """Bytes per second to a node, and seconds by which its clock is ahead."""
    try:
        with socket.create_connection((address, port), timeout=4) as link:
            link.settimeout(8)
            begin = time.time()
            link.sendall(b"t")
            (clock,) = struct.unpack("d", link.recv(8, socket.MSG_WAITALL))
            ahead = clock - (begin + time.time()) / 2
            begin = time.perf_counter()
            link.sendall(bytes(LINK_BYTES))
            link.shutdown(socket.SHUT_WR)
            link.recv(1)  # the other side answers when it has read everything
            return LINK_BYTES / (time.perf_counter() - begin), ahead
    except (OSError, struct.error):
        return _DEAD, 0.0


def _serve(server: socket.socket, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            link, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(link,), daemon=True).start()


def _answer(link: socket.socket) -> None:
    with link:
        link.settimeout(10)
        try:
            link.recv(1)
            link.sendall(struct.pack("d", time.time()))
            while link.recv(1 << 20):
                pass
            link.sendall(b"k")
        except OSError:
            return


def link_problems(links: Mapping[str, Mapping[str, Sequence[float]]], least: float) -> list[str]:
    """One line per dead or slow link, slow node and wrong clock.

    Args:
        links: what `check_links` measured, by node. least: bytes per second that every link must carry.
    """
    lines = []
    speeds = {(source, target): speed for source, by in links.items() for target, (speed, _) in by.items()}
    lines += [f"node {source} cannot reach node {target}" for (source, target), speed in speeds.items() if speed < 0]
    alive = {link: speed for link, speed in speeds.items() if speed > 0}
    into: dict[str, float] = {}
    for (_, target), speed in alive.items():
        into[target] = max(into.get(target, 0.0), speed)
    slow_nodes = set()
    if len(into) > 2:
        usual = median(into.values())
        for node, speed in into.items():
            if speed < _SLOW_NODE * usual:
                slow_nodes.add(node)
                lines.append(
                    f"node {node} is slow: the best link into it carries {speed / 1e6:.1f} MB/s, "
                    f"the median is {usual / 1e6:.1f} MB/s"
                )
    usual = median(alive.values()) if len(alive) > 2 else 0.0
    for (source, target), speed in alive.items():
        if target not in slow_nodes and speed < max(least, _SLOW_LINK * usual):
            limit = f"--least-mbit asks for {least / 1e6:.1f}" if speed < least else f"the median is {usual / 1e6:.1f}"
            lines.append(f"the link from node {source} to node {target} is slow: {speed / 1e6:.1f} MB/s, {limit} MB/s")
    clocks = {source: by for source, by in links.items() if by}
    for source, by in list(clocks.items())[1:]:
        first = next(iter(clocks))
        speed, ahead = by.get(first, (_DEAD, 0.0))
        if speed > 0 and abs(ahead) > _MOST_SKEW:
            side = "behind" if ahead > 0 else "ahead of"
            lines.append(
                f"the clock of node {source} is {abs(ahead):.1f} s {side} node {first}'s: start chrony or ntpd"
            )
    return lines
