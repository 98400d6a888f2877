"""What people do between and around steps: it works as under torch.optim and DDP, or one line says why not."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel

from distributed_muon import DistributedMuon, muon_param_groups
from tests.checks import on_ranks
from tests.reference import Reference, backward, rank_gradient

MUON = dict(lr=0.02, weight_decay=0.1)
ADAMW = dict(lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.second = nn.Linear(7, 12), nn.LayerNorm(12), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


@dataclass
class Run:
    """A model under DistributedMuon and its twin under torch's optimizers, a step at a time."""

    dtype: torch.dtype
    rank: int
    world: int
    seen: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = Net(seed=self.rank).to(self.dtype)  # rank 0's weights are everybody's
        self.build()
        algorithms = ["muon" if p.ndim == 2 else "adamw" for p in self.params]
        start = Net(seed=0).to(self.dtype)
        self.reference = Reference(list(zip(start.parameters(), algorithms, strict=True)), MUON, ADAMW)
        self.number = 0

    def build(self) -> None:
        self.params = list(self.model.parameters())
        options = dict(ns_form="standard", layout="bucketed", bucket_mb=0.0002, nonfinite="raise", **MUON)
        self.optimizer = DistributedMuon(muon_param_groups(self.model), **options)

    def grads(self, rank: int, number: int | None = None) -> list[Tensor]:
        number = self.number if number is None else number
        return [rank_gradient(tuple(p.shape), number, rank, i) for i, p in enumerate(self.params)]

    def mean(self, number: int | None = None) -> list[Tensor]:
        of_ranks = [self.grads(rank, number) for rank in range(self.world)]
        return [torch.stack(grads).sum(0) / self.world for grads in zip(*of_ranks, strict=True)]

    def backward(self) -> None:
        backward(self.params, self.grads(self.rank))

    def step(self, grads: list[Tensor | None] | None = None) -> None:
        """Step both, the twin on `grads` (the mean of this number's gradients if None), and compare."""
        self.optimizer.step()
        self.reference.step(self.mean() if grads is None else grads)
        self.optimizer.zero_grad()
        self.number += 1
        self.compare()

    def train(self) -> None:
        self.backward()
        self.step()

    def compare(self) -> None:
        for i, (ours, theirs) in enumerate(zip(self.model.parameters(), self.reference.params, strict=True)):
            assert torch.equal(ours, theirs.to(self.dtype)), f"parameter {i}: {(ours - theirs).abs().max()}"

    @torch.no_grad()
    def write(self, change: Callable[[Tensor], object]) -> None:
        """Change every parameter and its twin; values must be exact in bf16."""
        for ours, theirs in zip(self.params, self.reference.params, strict=True):
            change(ours)
            theirs.copy_(ours)


HABITS: dict[str, Callable[[Run], None]] = {}
REFUSED: dict[str, tuple[str, Callable[[Run], None]]] = {}


def habit(function: Callable[[Run], None]) -> Callable[[Run], None]:
    HABITS[function.__name__] = function
    return function


def refused(says: str) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    def note(function: Callable[[Run], None]) -> Callable[[Run], None]:
        REFUSED[function.__name__] = says, function
        return function

    return note


# ---- parameters --------------------------------------------------------------------------------------------


@habit
def move_to_where_it_is(run: Run) -> None:
    run.model.to("cpu:0").to(run.dtype)


@habit
def other_dtype_and_back(run: Run) -> None:
    """Row 40."""
    run.model.double().to(run.dtype)
    assert run.params[0].data_ptr() != run.optimizer._buckets[0]._places[0][0]


@habit
def new_data(run: Run) -> None:
    for p in run.params:
        p.data = p.data.clone()


@habit
def new_data_with_other_strides(run: Run) -> None:
    run.params[0].data = run.params[0].data.t().contiguous().t()


@habit
def turned_in_place(run: Run) -> None:
    def turn(p: Tensor) -> None:
        p.copy_(torch.arange(1.0, p.numel() + 1).view(p.shape))
        p.data = p.data.view(p.shape[::-1]).t() if p.ndim == 2 else p.data

    run.write(turn)


@habit
def new_data_with_other_values(run: Run) -> None:
    run.write(lambda p: setattr(p, "data", torch.full_like(p, 4.25)))


@habit
def vector_and_back(run: Run) -> None:
    vector_to_parameters(parameters_to_vector(run.params).detach().clone(), run.params)


@habit
def write_in_place(run: Run) -> None:
    run.write(lambda p: p.fill_(5.5))


@habit
def write_through_data(run: Run) -> None:
    """Row 42: no version counter tells."""
    run.write(lambda p: p.data.fill_(3.5))


@habit
def clamp_through_data(run: Run) -> None:
    run.write(lambda p: p.data.clamp_(2.5, 2.5))


@habit
def initialize_again(run: Run) -> None:
    run.write(lambda p: nn.init.constant_(p, 6.75))


@habit
def load_a_model(run: Run) -> None:
    loaded = {key: torch.full_like(value, 7.5) for key, value in run.model.state_dict().items()}
    run.model.load_state_dict(loaded)
    run.write(lambda p: p)


@habit
def share_memory(run: Run) -> None:
    run.model.share_memory()


@habit
def copy_the_model(run: Run) -> None:
    other = copy.deepcopy(run.model)
    for p in other.parameters():
        p.data.zero_()
        assert p.grad is None


@habit
def copy_the_model_after_backward(run: Run) -> None:
    run.backward()
    copy.deepcopy(run.model)
    run.step()


@habit
def save_the_model(run: Run) -> None:
    """Row 41: every tensor of its own, no more bytes than its elements."""
    file = io.BytesIO()
    torch.save(run.model.state_dict(), file)
    assert file.tell() < 4 * sum(p.numel() for p in run.params) + 4000
    storages = {p.untyped_storage().data_ptr() for p in run.params}
    assert len(storages) == len(run.params)
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.is_contiguous() for p in run.params)


@habit
def pickle_the_model(run: Run) -> None:
    other = pickle.loads(pickle.dumps(run.model))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), run.params, strict=True))


@habit
def average_the_weights(run: Run) -> None:
    AveragedModel(run.model).update_parameters(run.model)


@habit
def evaluate(run: Run) -> None:
    run.model.eval()
    with torch.no_grad():
        run.model(torch.ones(2, 7, dtype=run.dtype))
    run.model.train()


@habit
def freeze_for_a_step(run: Run) -> None:
    run.params[0].requires_grad_(False)
    backward(run.params[1:], run.grads(run.rank)[1:])
    run.step([None, *run.mean()[1:]])
    run.params[0].requires_grad_(True)


@habit
def rank_0_decides_the_start(run: Run) -> None:
    """Row 43: the model of rank r was built with seed r."""
    run.optimizer.check_replicas()


@refused(r"parameter '\w+\.weight' is now \(\d+, \d+\) torch\.float64 on cpu, the optimizer was built for")
def other_dtype(run: Run) -> None:
    run.model.double()
    run.params[0].grad = torch.zeros_like(run.params[0])
    run.optimizer.state_dict()


@refused(r"parameter 'first\.weight' is now \(3, 7\) torch\.\w+ on cpu, the optimizer was built for \(12, 7\)")
def other_shape(run: Run) -> None:
    """Row by row the memory is the same."""
    run.params[0].data = run.params[0].data[:3]
    run.optimizer.state_dict()


@refused(r"parameter 'first\.weight' of the model was replaced by another nn\.Parameter, as load_state_dict\(assign")
def load_by_assigning(run: Run) -> None:
    run.model.load_state_dict({k: v.clone() for k, v in run.model.state_dict().items()}, assign=True)
    run.backward()
    run.optimizer.step()


@refused(r"parameter 'second\.weight' of the model was replaced")
def new_parameter(run: Run) -> None:
    run.model.second.weight = nn.Parameter(run.model.second.weight.detach().clone())
    run.optimizer.state_dict()


@refused(r"parameters '(a|b)' and '(a|b)' share memory: tie them by assigning the same nn\.Parameter")
def tie_by_data(run: Run) -> None:
    """Row 46."""
    first, second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    second.data = first.data
    DistributedMuon([("a", first), ("b", second)])


# ---- gradients ---------------------------------------------------------------------------------------------


@habit
def zero_through_the_model(run: Run) -> None:
    run.backward()
    run.optimizer.step()
    run.reference.step(run.mean())
    run.model.zero_grad()
    run.number += 1
    run.compare()


@habit
def zero_to_zeros(run: Run) -> None:
    run.backward()
    run.model.zero_grad(set_to_none=False)
    run.train()


@habit
def drop_a_batch(run: Run) -> None:
    """Row 48: dropped by the optimizer, by the model and by hand, before the step."""
    for drop in (run.optimizer.zero_grad, run.model.zero_grad, lambda: [setattr(p, "grad", None) for p in run.params]):
        run.backward()
        drop()
        run.number += 1
        run.train()


@habit
def skip_one_parameter(run: Run) -> None:
    run.backward()
    run.params[1].grad = None
    grads = run.mean()
    run.step([grads[0], None, *grads[2:]])


@habit
def bring_your_own_gradient(run: Run) -> None:
    run.backward()
    for p, grad in zip(run.params, run.grads(run.rank, 7), strict=True):
        p.grad = grad.to(run.dtype)
    run.step(run.mean(7))


@habit
def accumulate_without_sync(run: Run) -> None:
    with run.optimizer.no_sync():
        run.backward()
    run.backward()
    run.step([2 * grad for grad in run.mean()])


@habit
def accumulate_and_forget_no_sync(run: Run) -> None:
    run.backward()
    run.backward()
    run.step([2 * grad for grad in run.mean()])


@habit
def accumulate_over_steps(run: Run) -> None:
    run.backward()
    run.optimizer.step()
    run.reference.step(run.mean())
    run.backward()
    run.step([2 * grad for grad in run.mean()])


@habit
def step_twice_on_one_gradient(run: Run) -> None:
    run.backward()
    run.optimizer.step()
    run.reference.step(run.mean())
    run.step()


@habit
def step_without_a_gradient(run: Run) -> None:
    before = [p.detach().clone() for p in run.params]
    with pytest.warns(UserWarning, match="no gradient of any parameter"):
        run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.params, strict=True))


@habit
def closure(run: Run) -> None:
    def compute() -> Tensor:
        run.optimizer.zero_grad()
        run.backward()
        return torch.tensor(3.0)

    assert run.optimizer.step(compute) == 3.0
    run.reference.step(run.mean())
    run.optimizer.zero_grad()
    run.compare()


@habit
def hook_that_scales(run: Run) -> None:
    handles = [p.register_hook(lambda grad: grad * 0.5) for p in run.params]
    run.backward()
    run.step([grad / 2 for grad in run.mean()])
    for handle in handles:
        handle.remove()


@habit
def create_graph(run: Run) -> None:
    terms = [(p * g.to(p.dtype)).sum() for p, g in zip(run.params, run.grads(run.rank), strict=True)]
    torch.stack([term.float() for term in terms]).sum().backward(create_graph=True)
    run.step()


@habit
def gradients_by_autograd_grad(run: Run) -> None:
    torch.autograd.grad(sum(p.square().sum() for p in run.params), run.params)
    assert all(p.grad is None for p in run.params)


@habit
def catch_an_error_in_backward(run: Run) -> None:
    """Row 50: some buckets are on their way when it raises."""

    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    handle = run.params[0].register_hook(fail)
    with pytest.raises(ArithmeticError):
        run.model(torch.ones(3, 7, dtype=run.dtype)).sum().backward()
    handle.remove()
    run.optimizer.zero_grad()


@habit
def look_whether_there_is_a_gradient(run: Run) -> None:
    run.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in run.params)
    mean = run.optimizer.gradient("first.weight")
    assert torch.equal(mean, run.mean()[0])
    run.step()


@habit
def clip(run: Run) -> None:
    run.backward()
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in run.mean()]).double()).item()
    assert run.optimizer.clip_grad_norm_(float("inf")) == pytest.approx(norm, rel=1e-12)
    run.step()


@refused(r"was moved into the buckets .*: clip with optimizer\.clip_grad_norm_\(max_norm\)")
def clip_by_habit(run: Run) -> None:
    """Row 48."""
    run.backward()
    clip_grad_norm_(run.params, 1.0)


@refused(r"was moved into the buckets")
def clip_values_by_habit(run: Run) -> None:
    run.backward()
    clip_grad_value_(run.params, 1.0)


@refused(r"p\.grad of parameter 'first\.weight' was moved .* aten\.mul_\.Tensor")
def edit_a_gradient(run: Run) -> None:
    run.backward()
    run.params[0].grad.mul_(0.5)


@refused(r"p\.grad of parameter 'first\.weight' was moved")
def edit_a_gradient_through_data(run: Run) -> None:
    """Row 49."""
    run.backward()
    run.params[0].grad.data.mul_(0.5)


@refused(r"p\.grad of parameter 'norm\.bias' was moved")
def look_at_a_gradient(run: Run) -> None:
    run.backward()
    torch.isnan(run.model.norm.bias.grad).any()


@refused(r"was moved into the buckets .* distributed_muon\.GradScaler")
def stock_scaler(run: Run) -> None:
    """Row 49."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(run.model(torch.ones(3, 7, dtype=run.dtype)).sum()).backward()
    scaler.step(run.optimizer)


@refused(r"was moved into the buckets")
def late_user_hook(run: Run) -> None:
    """Row 49: a hook that runs after ours."""
    run.params[0].register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    run.backward()


@refused(r"max_norm=-1 must be a number >= 0")
def clip_below_zero(run: Run) -> None:
    run.backward()
    run.optimizer.clip_grad_norm_(-1)


@refused(r"max_norm=nan must be a number >= 0")
def clip_at_nan(run: Run) -> None:
    run.backward()
    run.optimizer.clip_grad_norm_(float("nan"))


@refused(r"backward between clip_grad_norm_\(\) or unscale_\(\) and step\(\)")
def backward_after_clipping(run: Run) -> None:
    run.backward()
    run.optimizer.clip_grad_norm_(1.0)
    run.backward()


@refused(r"parameter 'weight' has a sparse gradient: build its embedding with sparse=False")
def sparse_embedding(run: Run) -> None:
    """Row 55."""
    table = nn.Embedding(5, 4, sparse=True)
    run.seen["kept"] = DistributedMuon([{"params": list(table.named_parameters()), "algorithm": "adamw"}])
    table(torch.tensor([1])).sum().backward()


# ---- options, state, lifetime ----------------------------------------------------------------------------------


@habit
def change_the_rate(run: Run) -> None:
    for group in (*run.optimizer.param_groups, *run.reference.groups()):
        group["lr"] *= 0.5


@habit
def schedulers(run: Run) -> None:
    pairs = [StepLR(o, 1, 0.5) for o in (run.optimizer, *run.reference.optimizers)]
    for _ in range(2):
        run.train()
        for scheduler in pairs:
            scheduler.step()


@habit
def one_cycle(run: Run) -> None:
    """Row 54: Muon's momentum and AdamW's first beta."""
    pairs = [OneCycleLR(o, 0.04, total_steps=8) for o in (run.optimizer, *run.reference.optimizers)]
    momenta = []
    for _ in range(4):
        run.train()
        for scheduler in pairs:
            scheduler.step()
        momenta.append({group["momentum"] for group in run.optimizer.param_groups})
    assert all(len(values) == 1 for values in momenta) and len(set().union(*momenta)) >= 3


@habit
def cyclic(run: Run) -> None:
    pairs = [CyclicLR(o, 0.01, 0.04, 2) for o in (run.optimizer, *run.reference.optimizers)]
    for _ in range(3):
        run.train()
        for scheduler in pairs:
            scheduler.step()


@habit
def save_and_load_the_state(run: Run) -> None:
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(state)


@habit
def hooks_of_the_optimizer(run: Run) -> None:
    """Row 55."""
    calls = []
    handles = [
        run.optimizer.register_state_dict_pre_hook(lambda o: calls.append("before saving")),
        run.optimizer.register_state_dict_post_hook(lambda o, state: calls.append("after saving")),
        run.optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("before loading")),
        run.optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after loading")),
        run.optimizer.register_step_post_hook(lambda *_: calls.append("step")),
    ]
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.train()
    assert calls == ["before saving", "after saving", "before loading", "after loading", "step"]
    for handle in handles:
        handle.remove()


@habit
def build_a_second_one(run: Run) -> None:
    """Row 47: the newer one has the parameters, and starts from their values."""
    before = run.optimizer
    run.build()
    twins = list(zip(run.reference.params, ["muon" if p.ndim == 2 else "adamw" for p in run.params], strict=True))
    rounded = [(nn.Parameter(p.detach().to(run.dtype)), algorithm) for p, algorithm in twins]
    run.reference = Reference(rounded, MUON, ADAMW)
    run.backward()
    with pytest.raises(RuntimeError, match="was closed, or replaced by a newer one on the same parameters"):
        before.step()
    run.step()


@refused(r"can neither be copied nor pickled, for it holds hooks and process groups")
def copy_the_optimizer(run: Run) -> None:
    """Row 55."""
    copy.deepcopy(run.optimizer)


@refused(r"can neither be copied nor pickled")
def pickle_the_optimizer(run: Run) -> None:
    pickle.dumps(run.optimizer)


@refused(r"add_param_group\(\) after construction")
def add_a_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})


@refused(r"parameter 'w' is on the meta device")
def meta_parameters(run: Run) -> None:
    """Row 55."""
    DistributedMuon([("w", nn.Parameter(torch.ones(2, 2, device="meta")))])


@refused(r"parameter 'w' is torch\.complex64: float32, bfloat16 and float16 are supported")
def complex_parameters(run: Run) -> None:
    DistributedMuon([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])


def try_all(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name, function in HABITS.items():
            run = Run(dtype, rank, world)
            try:
                run.train()
                function(run)
                run.train()
                run.train()
            except Exception as error:
                raise AssertionError(f"{name} in {dtype} on {world} ranks") from error
            run.optimizer.close()
        for name, (says, function) in REFUSED.items():
            run = Run(dtype, rank, world)
            run.train()
            try:
                function(run)
            except (RuntimeError, ValueError, TypeError) as error:
                assert re.search(says, str(error)) and "\n" not in str(error), f"{name} in {dtype}: {error}"
            else:
                raise AssertionError(f"{name} in {dtype} on {world} ranks was not refused")
            run.optimizer.close()


def test_habits_on_one_rank() -> None:
    """Each of these trained nothing, lost values, or raised about internals, in fp32 or in bf16, before."""
    assert len(HABITS) + len(REFUSED) >= 60
    try_all(0, 1)


@on_ranks(2, timeout=240)
def test_habits_on_two_ranks(rank: int, world: int) -> None:
    try_all(rank, world)


@on_ranks(2, timeout=240)
def test_gradients_that_ddp_averages_too_are_refused(rank: int, world: int) -> None:
    run = Run(torch.float32, rank, world)
    wrapped = nn.parallel.DistributedDataParallel(run.model)
    with pytest.raises(RuntimeError, match=r'where DistributedDataParallel averages it, .* gradient_reduction="none"'):
        wrapped(torch.ones(3, 7)).sum().backward()


def test_the_same_memory_as_another_dtype_is_refused() -> None:
    param = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    optimizer = DistributedMuon([("w", param)])
    param.data = param.data.view(torch.float16)
    with pytest.raises(RuntimeError, match=r"parameter 'w' is now \(4, 6\) torch\.float16 on cpu"):
        optimizer.state_dict()
