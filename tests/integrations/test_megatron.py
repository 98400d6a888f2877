"""Real megatron-core jobs on gloo: every parallelism trains the weights that one rank trains."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from perf.megatron_step import base_case, directions
from tests.integrations import megatron_cpu
from tests.integrations.megatron_job import LR, Case, Job
from tests.spawn import run_ranks

pytestmark = pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed")

STEPS = 5
TOLERANCE = 1e-6
DENSE, MOE = Case(), Case(moe=True)
TIED, GATED, MLA, WIDE = Case(tied=True), Case(gate=True), Case(mla=True), Case(model={"num_query_groups": 4})
# One query group, fewer than TP ranks, and every head a matrix of its own.
HEADS = Case(model={"num_query_groups": 1}, optimizer={"overrides": {"*linear_qkv.weight": "per_head"}})
SMALL = 3000  # elements: less than a matrix, so that every bucket holds few and shards straddle
BF16 = Case(moe=True, dtype=torch.bfloat16)
# Matrices: per layer q, k, v (, gate), proj, gate, up, down; experts 3 each, shared experts 3, router 1.
MATRICES = {"dense": 28, "moe": 80, "gated": 32, "mla": 36, "heads": 40}

ON_TWO = {
    "DP2": DENSE,
    "DP2 overlap small buckets": DENSE.but(overlap=True, bucket=SMALL),
    "TP2": DENSE.but(tp=2),
    "TP2 gather": DENSE.but(tp=2, optimizer={"strategy": "gather"}),
    "TP2 wide": WIDE.but(tp=2),
    "TP2 gated": GATED.but(tp=2),
    "TP2 heads": HEADS.but(tp=2),
    "PP2 tied": TIED.but(pp=2),
    "PP2 virtual": DENSE.but(pp=2, vpp=2, overlap=True),
    "EP2": MOE.but(ep=2),
}
ON_FOUR = {
    "DP4": DENSE,
    "TP4": WIDE.but(tp=4),
    "TP2xDP2 overlap small buckets": DENSE.but(tp=2, overlap=True, bucket=SMALL),
    "PP2xDP2 tied overlap": TIED.but(pp=2, overlap=True),
    "TP2xPP2": DENSE.but(tp=2, pp=2),
    "TP2xEP2xETP1": MOE.but(tp=2, ep=2, etp=1),
}
ALIGNED = {
    "DP2 aligned": TIED.but(aligned=True, overlap=True, bucket=20000),
    "EP2 aligned": MOE.but(ep=2, aligned=True),
}


OVERFLOWS = {"overflow": 8.0, "fp16 overflow": 4.0}  # the loss scale afterwards: constant, and halved
# option: what is set where; each is refused by its name
REFUSED: dict[str, list[tuple[str, str, Any]]] = {
    "optimizer='muon'": [("config", "optimizer", "muon")],
    "use_distributed_optimizer=False": [("config", "use_distributed_optimizer", False)],
    "decoupled_weight_decay=False": [("config", "decoupled_weight_decay", False)],
    "overlap_param_gather_with_optimizer_step": [("config", "overlap_param_gather_with_optimizer_step", True)],
    "use_precision_aware_optimizer": [("config", "use_precision_aware_optimizer", True)],
    "optimizer_cpu_offload": [("config", "optimizer_cpu_offload", True)],
    "num_distributed_optimizer_instances > 1": [("ddp", "num_distributed_optimizer_instances", 2)],
    "fp8_param_gather": [("ddp", "fp8_param_gather", True)],
    "fp4_param_gather": [("ddp", "fp4_param_gather", True)],
    "reuse_grad_buf_for_mxfp8_param_ag": [("ddp", "reuse_grad_buf_for_mxfp8_param_ag", True)],
    "use_megatron_fsdp": [("ddp", "use_megatron_fsdp", True)],
    "use_layer_wise_distributed_optimizer": [("config", "use_layer_wise_distributed_optimizer", True)],
    "optimizer_cuda_graph": [("config", "optimizer_cuda_graph", True)],
    "qk_clip": [("model", "qk_clip", True)],
    "no matrix": [],
}


def new_megatron() -> bool:
    """Whether this megatron-core takes a full_param_layout."""
    from megatron.core.distributed import DistributedDataParallel

    return "full_param_layout" in DistributedDataParallel.__init__.__code__.co_varnames


# ---- what the ranks run ------------------------------------------------------------------------------------


def run_one(rank: int, world: int) -> dict[str, Any]:
    """One rank: the references, and a check of the dense one against torch.optim.Muon."""
    megatron_cpu.install()
    cases = {"dense": DENSE, "moe": MOE, "tied": TIED, "gated": GATED, "mla": MLA, "wide": WIDE}
    cases["heads"] = HEADS
    results = {name: train(case) for name, case in cases.items()}
    results["mla gradients"] = step_on_gradients(MLA)
    results["bf16"] = step_on_gradients(BF16)
    results["lr x 1.01"] = train(DENSE.but(config={"lr": LR * 1.01}), scale=1.01)
    results["torch"] = against_torch()
    if new_megatron():
        results["large"] = large_model_exchange()
    return results


def run_two(rank: int, world: int) -> dict[str, Any]:
    megatron_cpu.install()
    cases = {**ON_TWO, **(ALIGNED if new_megatron() else {})}
    results = {name: train(case) for name, case in cases.items()}
    with tp_slice_left_out():
        results["TP2 slice left out"] = train(DENSE.but(tp=2))
    # Without Transformer Engine, Megatron's MLA loses part of the rotary key's gradient under TP: its step alone.
    results["TP2 MLA"] = step_on_gradients(MLA.but(tp=2))
    results["bf16 CP2"] = step_on_gradients(BF16.but(cp=2))
    results["bf16 EP2"] = step_on_gradients(BF16.but(ep=2))
    results["overflow"] = overflow(DENSE.but(dtype=torch.bfloat16, config={"loss_scale": 8.0}))
    scaled = {"initial_loss_scale": 8.0, "hysteresis": 1}
    results["fp16 overflow"] = overflow(DENSE.but(dtype=torch.float16, config=scaled))
    results["padding"] = padding_is_never_read(DENSE)
    results["disagreement"] = disagreement(rank)
    results["outside writes"] = outside_writes()
    if new_megatron() and importlib.util.find_spec("emerging_optimizers"):
        results["cosine"] = directions(base_case(tp=2, ep=1))
    results["refusals"] = {option: refusal(option) for option in REFUSED}
    return results


def run_four(rank: int, world: int) -> dict[str, Any]:
    megatron_cpu.install()
    results = {name: train(case) for name, case in ON_FOUR.items()}
    # Expert tensor parallelism gathers uneven tensors in the forward, which gloo cannot: its step alone.
    results["bf16 TP2xEP2xETP2"] = step_on_gradients(BF16.but(tp=2, ep=2, etp=2))
    results["bf16 TP2xEP2xETP1"] = step_on_gradients(BF16.but(tp=2, ep=2, etp=1))
    return results


def train(case: Case, scale: float = 1.0) -> dict[str, Any]:
    """Train a case, then measure it: weights, losses, NS counts over the world, norms, bytes of state."""
    job = Job(case)
    if scale != 1.0:
        job.scheduler.max_lr *= scale
        for group in job.optimizer.param_groups:
            group["max_lr"] = LR * scale
        job.scheduler.step(0)
    history, calls = [], 0
    for _ in range(STEPS):
        history.append(job.step())
        calls += job.muon.step_report()["ns_calls"]
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, calls)
    weights = plain(job.weights())
    unique = sum(value.size for value in weights.values())
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, state_bytes(job))
    return {
        "weights": weights,
        "history": history,
        "ns_calls": counts,
        "norm of ones": norm_of(job, 1.0),
        "zeros": norm_of(job, 0.0),
        "unique": unique,
        "bytes": held,
        "exchange": [domain.engine.plan.exchange_bytes_by_rank for domain in job.muon.domains],
        "straddling": straddling(job),
    }


def norm_of(job: Job, value: float) -> float:
    """Megatron's norm with every gradient `value`, or its zero count where that is 0."""
    for _, param in job.named_parameters():
        param.main_grad.fill_(value)
    job.optimizer.prepare_grads()
    return job.optimizer.get_grad_norm() if value else job.optimizer.count_zeros()


def state_bytes(job: Job) -> tuple[int, float]:
    """Bytes of masters and moments that this rank owns, and the share that is ideal: 8 x Muon + 12 x AdamW."""
    own = sum(t.numel() * 4 for owned in job.muon.owned for t in (owned.master, *owned.state.values()) if t.ndim)
    ideal = 0.0
    for domain in job.muon.domains:
        for member in domain.members:
            ideal += member.param.numel() * (12 if member.spec.rule is None else 8) / len(domain.cut)
    return own, ideal


def straddling(job: Job) -> int:
    """Matrices of this rank's domains with pieces on several ranks."""
    count = 0
    for domain in job.muon.domains:
        ranks: dict[int, set[int]] = {}
        for piece in domain.engine.plan.layout.pieces:
            ranks.setdefault(piece.matrix, set()).add(piece.rank)
        count += sum(len(held) > 1 for held in ranks.values())
    return count


def step_on_gradients(case: Case) -> dict[str, np.ndarray]:
    """fp32 masters after three steps on given whole gradients."""
    job = Job(case)
    for step in range(3):
        job.set_gradients(step)
        assert job.optimizer.step()[0]
    masters = job.masters()
    for name, value in job.weights().items():
        assert torch.equal(value, masters[name].to(value.dtype)), f"{name} is not its master, rounded"
    return plain(masters)


def plain(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """As arrays: Megatron makes tensors that cannot be unpickled without it."""
    return {name: value.numpy() for name, value in weights.items()}


def against_torch() -> dict[str, float]:
    """Largest difference of each kind of parameter from torch's optimizers on hand-cut matrices, bf16 NS."""
    exact = {"ns_dtype": torch.bfloat16, "ns_form": "standard"}
    job = Job(GATED.but(optimizer=exact, config={"clip_grad": 0.0}))
    twins: dict[str, list[torch.nn.Parameter]] = {}
    for name, param in job.named_parameters():
        parts = cut_by_hand(name, param.detach())
        twins[name] = [torch.nn.Parameter(part.clone()) for part in parts]
    muon = [p for name, parts in twins.items() if is_hidden(name, parts[0]) for p in parts]
    rest = [p for name, parts in twins.items() if not is_hidden(name, parts[0]) for p in parts]
    decayed = [p for p in rest if p.ndim > 1]
    plain = {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}
    optimizers = [
        torch.optim.Muon(muon, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": decayed}, plain], lr=LR, weight_decay=0.1, betas=(0.9, 0.999), eps=0.1),
    ]
    for step in range(3):
        job.set_gradients(step)
        whole = {name: param.main_grad.clone() for name, param in job.named_parameters()}
        for name, parts in twins.items():
            for twin, grad in zip(parts, cut_by_hand(name, whole[name]), strict=True):
                twin.grad = grad
        job.optimizer.step()
        for optimizer in optimizers:
            optimizer.step()
    worst = {"muon": 0.0, "adamw": 0.0}
    for name, param in job.named_parameters():
        parts = cut_by_hand(name, param.detach())
        kind = "muon" if is_hidden(name, parts[0]) else "adamw"
        for ours, twin in zip(parts, twins[name], strict=True):
            worst[kind] = max(worst[kind], float((ours - twin).abs().max()))
    return worst


def large_model_exchange(ranks: int = 8, hidden: int = 4096, ffn: int = 14336, layers: int = 32) -> dict[str, float]:
    """Share of a large dense model's matrix elements that travel, with Megatron's layout and the aligned one."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from distributed_muon.integrations.megatron import shard_aligned_param_layout
    from distributed_muon.layout.cutting import Bucket, cut_buckets
    from distributed_muon.layout.matrices import Split, TensorSpec, Whole
    from distributed_muon.layout.pieces import Layout
    from distributed_muon.layout.plan import make_plan

    rules = {
        "qkv": ((hidden + 2048, hidden), Split((hidden, 1024, 1024))),
        "proj": ((hidden, hidden), Whole()),
        "fc1": ((2 * ffn, hidden), Split((ffn, ffn))),
        "fc2": ((hidden, ffn), Whole()),
    }
    model, specs = torch.nn.ParameterDict(), []
    for layer in range(layers):
        for name, (shape, rule) in rules.items():
            model[f"{layer}{name}"] = torch.nn.Parameter(torch.empty(shape, device="meta"))
            specs.append(TensorSpec(f"{layer}{name}", shape, rule))
    params, config, size = list(model.values()), DistributedDataParallelConfig(), 40_000_000
    layouts = {
        "stock": DistributedOptimizer.compute_full_param_layout(params, size, ranks, config),
        "aligned": shard_aligned_param_layout(model, config, ranks, bucket_size=size),
    }
    total = sum(spec.numel for spec in specs)
    shares: dict[str, float] = {}
    for name, full in layouts.items():
        (layout,) = full.layouts.values()
        buckets = []
        for number, (begin, end) in enumerate(layout.bucket_indices):
            held = [(layout.param_index_map[p][0] - begin, t) for t, p in enumerate(params)
                    if layout.param_index_map[p][2] == number]  # fmt: skip
            offsets, tensors = zip(*sorted(held), strict=True)
            buckets.append(Bucket(tensors, offsets, end - begin))
        plan = make_plan(Layout.build(specs, cut_buckets(buckets, [s.numel for s in specs], ranks)), "home")
        shares[name] = sum(plan.exchange_bytes_by_rank) / (2 * plan.newton_schulz.element_bytes * total)
        shares["padding"] = layout.bucket_indices[-1][1] / total - 1
    return shares


def is_hidden(name: str, value: Tensor) -> bool:
    return value.ndim == 2 and "embedding" not in name and "output_layer" not in name


def cut_by_hand(name: str, value: Tensor) -> list[Tensor]:
    """The matrices of a one-rank parameter: heads 4, groups 2, head size 8, an output gate, gated MLP."""
    if "linear_qkv" in name:
        groups = value.view(2, 48, -1).split([16, 16, 8, 8], dim=1)
        return [part.reshape(-1, value.shape[1]) for part in groups]
    return list(value.chunk(2)) if "linear_fc1" in name else [value]


@contextlib.contextmanager
def tp_slice_left_out() -> Iterator[None]:
    """Read linear_proj as if tensor parallelism had not cut it."""
    import distributed_muon.integrations.megatron as adapter

    original: Callable[..., Any] = adapter.read_parameters

    def wrong(*args: Any) -> Any:
        members = original(*args)
        for number, member in enumerate(members):
            if "linear_proj" in member.name:
                spec = replace(member.spec, tp_dim=None, tp_size=1)
                members[number] = replace(member, spec=spec)
        return members

    adapter.read_parameters = wrong
    try:
        yield
    finally:
        adapter.read_parameters = original


def overflow(case: Case) -> dict[str, Any]:
    """An inf on one rank: what step() says, whether state moved, and whether unscaling is right afterwards."""
    job = Job(case)
    job.set_gradients(0)
    before = {key: job.masters(key) for key in ("master", "momentum_buffer", "exp_avg", "exp_avg_sq")}
    own = job.muon.owned[0]
    if dist.get_rank() == 1:
        own.param.main_grad.view(-1)[own.start] = float("inf")
    said = job.optimizer.step()
    after = {key: job.masters(key) for key in before}
    same = all(torch.equal(before[key][name], after[key][name]) for key in before for name in before[key])
    job.set_gradients(0)
    scale = job.optimizer.get_loss_scale().item()
    expected = torch.cat([p.main_grad.reshape(-1) for _, p in job.named_parameters()]).norm() / scale
    ok, norm, _ = job.optimizer.step()
    return {"said": said, "same": same, "ok": ok, "norm": norm, "expected": float(expected), "scale": scale}


def padding_is_never_read(case: Case) -> bool:
    """Poison every padding element of the buffers; the step must stay finite and the norm right."""
    job = Job(case.but(bucket=SMALL))
    job.set_gradients(0)
    for buffer in job.chunks[0].buffers:
        covered = torch.zeros(buffer.numel, dtype=torch.bool)
        for start, end, _ in buffer.param_index_map.values():
            covered[start:end] = True
        assert not covered.all(), "the case must have padding"
        buffer.grad_data[~covered] = float("nan")
        buffer.param_data[~covered] = float("nan")
    ok, norm, _ = job.optimizer.step()
    return ok and norm < 1e6 and all(bool(value.isfinite().all()) for value in job.weights().values())


def disagreement(rank: int) -> list[str]:
    """Ranks with other options or parameters must all fail at construction; the errors of this rank."""
    said = []
    for options in ({"momentum": 0.9}, {"overrides": {"*linear_proj.weight": "adamw"}}):
        try:
            Job(DENSE.but(optimizer=options if rank else {}))
            said.append("accepted")
        except RuntimeError as error:
            said.append(str(error))
    return said


def refusal(option: str) -> str:
    """What construction says to an option that cannot be honoured."""
    from distributed_muon.integrations.megatron import get_distributed_muon_optimizer

    def make(config: Any, chunks: list[Any]) -> Any:
        for owner, name, value in REFUSED[option]:
            target = {"config": config, "ddp": chunks[0].ddp_config, "model": chunks[0].config}[owner]
            setattr(target, name, value)
        keywords = {"overrides": {"*": "adamw"}} if option == "no matrix" else {}
        return get_distributed_muon_optimizer(config, chunks, **keywords)

    try:
        Job(DENSE, make)
    except ValueError as error:
        return str(error)
    return "accepted"


def outside_writes() -> dict[str, float]:
    """How far bf16 masters are from values written into the model, noticed or reloaded; and from a state dict."""
    job = Job(DENSE.but(dtype=torch.bfloat16))
    with torch.no_grad():
        for _, param in job.named_parameters():
            param.copy_(torch.full_like(param, 0.5))
    for _, param in job.named_parameters():
        param.main_grad.zero_()
    for group in job.optimizer.param_groups:
        group["lr"] = 0.0
    job.optimizer.step()
    noticed = max(float((value - 0.5).abs().max()) for value in job.masters().values())
    for _, param in job.named_parameters():
        param.data.fill_(0.25)
    job.optimizer.reload_model_params()
    reloaded = max(float((value - 0.25).abs().max()) for value in job.masters().values())
    state = {name: torch.full(param.shape, 0.3) for name, param in job.chunks[0].module.module.named_parameters()}
    job.optimizer.reload_model_params({"model": state})
    precise = max(float((value - 0.3).abs().max()) for value in job.masters().values())
    return {"noticed": noticed, "reloaded": reloaded, "precise": precise}


# ---- what is asserted ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(run_one, 1, timeout=120)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(run_two, 2, timeout=170)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(run_four, 4, timeout=170)


def reference_of(case: Case) -> str:
    names = {
        "heads": case.model == HEADS.model,
        "moe": case.moe,
        "gated": case.gate,
        "mla": case.mla,
        "tied": case.tied,
        "wide": bool(case.model),
    }
    return next((name for name, chosen in names.items() if chosen), "dense")


def difference(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    assert ours.keys() == reference.keys()
    return max(float(np.abs(ours[name] - value).max()) for name, value in reference.items())


def check_run(name: str, case: Case, result: dict[str, Any], one: dict[str, Any]) -> None:
    reference = one[reference_of(case)]
    gap = difference(result["weights"], reference["weights"])
    print(f"{name}: largest difference of a weight {gap:.1e}")
    assert gap <= TOLERANCE
    for ours, theirs in zip(result["history"], reference["history"], strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)
    matrices = MATRICES.get(reference_of(case), MATRICES["dense"])
    copies = len(result["ns_calls"]) if case.optimizer.get("strategy") == "gather" else 1
    assert sum(result["ns_calls"]) == matrices * STEPS * copies
    assert reference["ns_calls"] == [matrices * STEPS]
    assert result["unique"] == reference["unique"]
    assert result["norm of ones"] == pytest.approx(result["unique"] ** 0.5, rel=1e-6)
    assert result["zeros"] == result["unique"]


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks_equal_one(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for results in two:
        check_run(name, ON_TWO[name], results[name], one)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if megatron_cpu.older() else []) for name in ON_FOUR]
)
def test_four_ranks_equal_one(name: str, one: dict[str, Any], four: list[dict[str, Any]]) -> None:
    for results in four:
        check_run(name, ON_FOUR[name], results[name], one)


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_layout_equals_one_rank(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    if name not in two[0]:
        pytest.skip("this megatron-core takes no full_param_layout")
    check_run(name, ALIGNED[name], two[0][name], one)


def test_aligned_layout_of_a_large_model_moves_little(one: dict[str, Any]) -> None:
    if "large" not in one:
        pytest.skip("this megatron-core takes no full_param_layout")
    print(f"share of the elements that leave their rank, 8 B parameters on 8 ranks: {one['large']}")
    assert one["large"]["aligned"] < 0.15 < 0.7 < one["large"]["stock"]
    assert one["large"]["padding"] < 0.02


def test_small_buckets_straddle(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    assert two[0]["DP2 overlap small buckets"]["straddling"] >= 8
    assert four[0]["TP2xDP2 overlap small buckets"]["straddling"] == MATRICES["dense"]


def test_one_rank_equals_torch(one: dict[str, Any]) -> None:
    assert one["torch"] == {"muon": 0.0, "adamw": 0.0}


def test_tensor_parallel_sizes_equal_each_other(
    one: dict[str, Any], two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    runs = [one["wide"]["weights"], two[0]["TP2 wide"]["weights"], four[0]["TP4"]["weights"]]
    assert difference(runs[0], runs[1]) <= TOLERANCE
    assert difference(runs[1], runs[2]) <= TOLERANCE


def test_wrong_runs_are_seen(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert difference(one["lr x 1.01"]["weights"], one["dense"]["weights"]) > 100 * TOLERANCE
    wrong = two[0]["TP2 slice left out"]["weights"]
    assert difference(wrong, one["dense"]["weights"]) > 100 * TOLERANCE


def test_steps_on_given_gradients_equal_one_rank(
    one: dict[str, Any], two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    assert difference(two[0]["TP2 MLA"], one["mla gradients"]) <= TOLERANCE
    assert difference(two[0]["bf16 CP2"], one["bf16"]) <= TOLERANCE
    assert difference(two[0]["bf16 EP2"], one["bf16"]) <= TOLERANCE
    assert difference(four[0]["bf16 TP2xEP2xETP1"], one["bf16"]) <= TOLERANCE
    assert difference(four[0]["bf16 TP2xEP2xETP2"], one["bf16"]) <= TOLERANCE


def test_overflow_on_one_rank_skips_everywhere(two: list[dict[str, Any]]) -> None:
    for seen, scale in [(results[name], scale) for results in two for name, scale in OVERFLOWS.items()]:
        assert seen["said"] == (False, None, None)
        assert seen["same"]
        assert seen["ok"] and seen["scale"] == scale
        assert seen["norm"] == pytest.approx(seen["expected"], rel=1e-5)


def test_padding_is_never_read(two: list[dict[str, Any]]) -> None:
    assert two[0]["padding"]


def test_ranks_that_disagree_fail_at_construction(two: list[dict[str, Any]]) -> None:
    for results in two:
        options, parameters = results["disagreement"]
        assert "ranks disagree" in options and "momentum" in options
        assert "ranks disagree" in parameters and "linear_proj.weight" in parameters


def test_options_that_cannot_be_honoured_are_refused(two: list[dict[str, Any]]) -> None:
    said = dict(two[0]["refusals"])
    assert "no parameter of any rank goes to Muon" in said.pop("no matrix")
    for option, message in said.items():
        assert message.startswith(option) and "is not supported" in message, (option, message)


def test_direction_is_that_of_megatrons_own_muon(two: list[dict[str, Any]]) -> None:
    if "cosine" not in two[0]:
        pytest.skip("this megatron-core's own Muon does not run here")
    print(two[0]["cosine"])
    assert set(two[0]["cosine"]) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "length ratio"}
    assert min(two[0]["cosine"].values()) > 0.999


def test_masters_follow_the_model(two: list[dict[str, Any]]) -> None:
    seen = two[0]["outside writes"]
    assert seen["noticed"] == 0.0
    assert seen["reloaded"] == 0.0
    assert seen["precise"] < 1e-7  # 0.3 is not a bf16 number: taken from the state dict, not from the model


def test_state_is_an_even_share(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    for name, result in [*two[0].items(), *four[0].items()]:
        if isinstance(result, dict) and "bytes" in result:
            shares = [own / ideal for own, ideal in result["bytes"]]
            print(f"{name}: state bytes per rank {[own for own, _ in result['bytes']]}, of the ideal share {shares}")
            assert sum(own for own, _ in result["bytes"]) <= 1.0001 * sum(ideal for _, ideal in result["bytes"])
            # With DP 4, Megatron's one bucket has embedding and output layer in its outer quarters: cuts are its own.
            assert max(shares) <= (1.1 if name == "DP4" else 1.02), name
