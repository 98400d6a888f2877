"""Phases and stragglers, FLOPs, and what the watchdog makes of the states of ranks."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.flops import peak_tflops, training_flops
from launch.models import build_model
from launch.phases import Phases, spread
from launch.profiling import merge_traces, step_range
from launch.sameness import spans
from launch.watchdog import RankState, diagnose, own_state


def test_a_phase_does_not_count_what_is_inside_it() -> None:
    phases = Phases()
    with phases("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with phases("inner"):
                time.sleep(0.03)
    seconds = phases.take()
    assert seconds["inner"] >= 0.06
    assert 0.02 <= seconds["outer"] < 0.06
    assert phases.take() == {}


def test_the_slowest_rank_is_the_one_with_the_most_work_of_its_own() -> None:
    ranks = [{"data": 0.1, "forward_backward": 1.0, "wait": 1.9}, {"data": 2.0, "forward_backward": 1.0}]
    found = spread(ranks, steps=2)
    assert found.least == {"data": 0.05, "forward_backward": 0.5, "wait": 0.0}
    assert found.most == {"data": 1.0, "forward_backward": 0.5, "wait": 0.95}
    assert found.straggler == 1 and found.ratio == pytest.approx(3 / 1.1)
    assert found.note(["a", "b"]) == (
        "straggler: rank 1 on b takes 2.7 times the median for its own forward and backward"
    )
    assert found.metrics()["straggler"] == 1 and found.metrics()["seconds_max/wait"] == 0.95
    even = spread([{"forward_backward": seconds} for seconds in (1.0, 1.1, 1.15)], 1)
    assert even.straggler is None and even.note(["a"] * 3) is None and "straggler" not in even.metrics()


@pytest.mark.parametrize("name", ["dense", "moonlight"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    length, batch = 32, 2
    model = build_model(name, vocab_size=64, hidden_size=32, num_attention_heads=2, max_position_embeddings=length)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # torch does not count fused attention on CPUs
        model(tokens, tokens).backward()
    # The router's weighted sum of the experts is a matmul to torch, and nothing to us.
    assert training_flops(model.config, length) * batch * length == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_peaks_are_known_by_the_device_s_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("some card") is peak_tflops(None) is None


# ---- watchdog ----------------------------------------------------------------------------------------------

HOSTS = ["n0", "n0", "n1", "n1"]


def waiting(number: int = 5, done: bool = False) -> RankState:
    return RankState("launch/world.py:50 sum", True, {"0 default_pg": (number, "all_reduce", done)})


def test_the_rank_that_works_while_others_wait_is_named_with_its_place() -> None:
    busy = RankState("launch/data.py:33 window", False, {"0 default_pg": (4, "all_reduce", True)})
    assert diagnose({0: waiting(), 1: waiting(), 2: busy, 3: waiting()}, HOSTS) == (
        "ranks 0-1, 3 wait in all_reduce number 5 of group 0 default_pg at launch/world.py:50 sum "
        "for rank 2 on n1, which is at launch/data.py:33 window"
    )


def test_ranks_that_do_not_answer_are_named_first() -> None:
    assert diagnose({0: waiting(), 1: waiting()}, HOSTS).endswith(
        "for ranks 2-3 on n1, which does not answer: its process is stopped, or its node is gone"
    )


def test_a_rank_that_is_collectives_behind_is_named() -> None:
    found = diagnose({0: waiting(7), 1: waiting(7), 2: waiting(7), 3: waiting(6)}, HOSTS)
    assert "for rank 3 on n1, which is at launch/world.py:50 sum, collectives behind" in found


def test_where_nobody_is_to_blame_the_place_is_told() -> None:
    assert diagnose({rank: waiting() for rank in range(4)}, HOSTS) == (
        "all ranks wait; rank 0 in all_reduce number 5 of group 0 default_pg at launch/world.py:50 sum"
    )
    idle = {rank: RankState("launch/loop.py:1 train", False) for rank in range(4)}
    assert diagnose(idle, HOSTS) == "no rank waits for another; rank 0 is at launch/loop.py:1 train"


def test_a_rank_knows_its_place() -> None:
    event = threading.Event()
    thread = threading.Thread(target=lambda: event.wait(5))
    thread.start()
    state = own_state(thread.ident)
    event.set()
    thread.join()
    assert state.place.startswith("tests/unit/test_monitoring.py:") and state.waits
    assert not own_state(threading.get_ident()).waits


def test_ranks_are_written_as_people_do() -> None:
    assert [spans(ranks) for ranks in ([3], [0, 1, 2], [4, 0, 1])] == ["rank 3", "ranks 0-2", "ranks 0-1, 4"]


# ---- traces ------------------------------------------------------------------------------------------------


def test_traces_of_ranks_are_merged_on_one_clock() -> None:
    def trace(base: int) -> dict:
        meta = {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}}
        return {
            "baseTimeNanoseconds": base,
            "traceEvents": [meta, {"ph": "X", "name": "a", "pid": 7, "ts": 10.0, "dur": 1.0, "id": 3}],
        }

    # Rank 1's clock is 2 ms ahead: what both call the same moment is later by that in its trace.
    merged = merge_traces({0: (0, trace(1_000_000)), 1: (2_000_000, trace(3_500_000))}, ["n0", "n1"])
    events = [event for event in merged["traceEvents"] if event["ph"] == "X"]
    assert [event["ts"] for event in events] == [10.0, 510.0]
    assert len({event["pid"] for event in events}) == len({event["id"] for event in events}) == 2
    names = [event["args"]["name"] for event in merged["traceEvents"] if event["ph"] == "M"]
    assert names == ["rank 0 on n0: python", "rank 1 on n1: python"]


def test_steps_to_profile_are_first_and_last() -> None:
    assert step_range("3:5") == (3, 5)
    for wrong in ("3", "5:3", "0:1", "a:b"):
        with pytest.raises(Exception, match="write FIRST:LAST, steps counted from 1"):
            step_range(wrong)
