"""What cannot be right under DeepSpeed ends in one line that names it, on every rank."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from distributed_muon.integrations.deepspeed import PartitionedOptimizer
from tests.checks import on_ranks
from tests.integrations.deepspeed_case import LR, Chosen, Run, zero_config

pytestmark = [
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README"),
    pytest.mark.timeout(300),
]
SECONDS = 240


def make(model: nn.Module | None = None, **options) -> PartitionedOptimizer:
    return PartitionedOptimizer((model or Chosen()).groups(), **options)


def test_deepspeed_would_orthogonalize_gradients_of_an_optimizer_called_muon() -> None:
    assert not [cls for cls in PartitionedOptimizer.__mro__ if "muon" in cls.__name__.lower()]


def test_tagged_parameters_are_refused() -> None:
    model = Chosen()
    model.matrices[1].use_muon = False
    make(model)
    model.matrices[1].use_muon = True
    with pytest.raises(ValueError, match=r"'matrices\.1' is tagged use_muon"):
        make(model)


def test_options_are_checked() -> None:
    for option, value in (("ns_form", "fast"), ("ns_dtype", torch.float16), ("strategy", "all"), ("lr", -1.0)):
        with pytest.raises(ValueError, match=option):
            make(**{option: value})
    with pytest.raises(RuntimeError, match="add_param_group"):
        make().add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    with pytest.raises(ValueError, match="closure"):
        make().step(lambda: 0.0)


def test_before_initialize_there_is_nothing_to_step_or_load() -> None:
    optimizer = make()
    assert optimizer.state_dict()["state"] == {}
    for call in (optimizer.step, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        with pytest.raises(ValueError, match=r"zero_optimization\.stage to 1"):
            call()


@on_ranks(2, timeout=SECONDS)
def test_engines_that_do_not_partition(rank: int, world: int) -> None:
    # A script of the user's own, whose config nobody checked: DeepSpeed names what it wants, in one line.
    own = zero_config(2, zero={"offload_optimizer": {"device": "cpu"}})
    for config, named in (
        ({**zero_config(1), "zero_allow_untested_optimizer": False}, '"zero_allow_untested_optimizer": true'),
        (own, '"zero_force_ds_cpu_optimizer": false'),
    ):
        with pytest.raises(Exception, match=re.escape(named)) as error:
            Run(config)
        assert "\n" not in str(error.value)
    run = Run(zero_config(0))
    with pytest.raises(ValueError, match=r"not partitioned.*zero_optimization\.stage to 1"):
        run.train_step(0, rank)


@on_ranks(2, timeout=SECONDS)
def test_parameters_that_changed_after_construction(rank: int, world: int) -> None:
    changes = [
        ("matrices.2", "use_muon", lambda p: setattr(p, "use_muon", True)),
        ("matrices.2", "tensor parallelism", lambda p: setattr(p, "tensor_model_parallel", True)),
        ("matrices.2", "no view of its group's flat buffer", lambda p: setattr(p, "data", p.data.clone())),
        (
            "experts.0",
            "no view of its group's flat buffer",
            lambda p: setattr(p, "data", p.new_ones(181)[1:].view_as(p)),
        ),
    ]
    for name, named, change in changes:
        run = Run(zero_config(1))
        change(run.model.get_parameter(name))
        with pytest.raises(ValueError, match=rf"'{re.escape(name)}'.*{named}"):
            run.train_step(0, rank)


@on_ranks(2, timeout=SECONDS)
def test_fp16_autocast(rank: int, world: int) -> None:
    from deepspeed.runtime import torch_autocast

    run = Run(zero_config(1))
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = True, torch.float16
    try:
        with pytest.raises(ValueError, match="torch_autocast"):
            run.optimizer.state_dict()
    finally:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


@on_ranks(2, timeout=SECONDS)
def test_ranks_that_disagree_all_stop(rank: int, world: int) -> None:
    run = Run(zero_config(1), momentum=0.9 + 0.01 * rank)
    with pytest.raises(RuntimeError, match=r"rank 0 has .*momentum.*rank 1 has"):
        run.train_step(0, rank)


@on_ranks(2, timeout=SECONDS)
def test_states_of_others_are_refused_and_change_nothing(rank: int, world: int) -> None:
    run = Run(zero_config(1))
    run.train_step(0, rank)
    before, state = run.snapshot(), run.optimizer.state_dict()

    def refused(change, named) -> None:
        other = {"state": {i: dict(s) for i, s in state["state"].items()}}
        other["param_groups"] = [dict(group) for group in state["param_groups"]]
        change(other)
        with pytest.raises(ValueError, match=named) as error:
            run.optimizer.load_state_dict(other)
        assert re.fullmatch(r"[^\n]+", str(error.value))
        assert all(map(torch.equal, before, run.snapshot()))

    refused(lambda o: o["param_groups"].pop(), "2 parameter groups")
    refused(lambda o: o["param_groups"][2].update(param_names=["vectors.1", "vectors.0"]), "held other parameters")
    refused(lambda o: o["param_groups"][0].update(algorithm="adamw"), "trained by adamw")
    refused(lambda o: o["param_groups"][0].pop("algorithm"), "another optimizer")
    refused(lambda o: o["state"][1].update(exp_avg=torch.zeros(3)), "ds_to_universal")
    run.optimizer.load_state_dict(state)
    # An Adam run's universal checkpoint arrives in the state itself.
    run.optimizer.state[run.flats[0]]["exp_avg_sq"] = torch.ones_like(run.flats[0])
    with pytest.raises(ValueError, match="is Adam's"):
        run.train_step(1, rank)


@on_ranks(2, timeout=SECONDS)
def test_pipeline_parallelism(rank: int, world: int) -> None:
    # The last one: the pipeline stays in DeepSpeed's globals.
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    model = PipelineModule([LayerSpec(nn.Linear, 4, 4) for _ in range(4)], num_stages=2, loss_fn=nn.functional.mse_loss)
    groups = [{"params": list(model.named_parameters()), "algorithm": "adamw"}]
    engine, *_ = deepspeed.initialize(model=model, optimizer=PartitionedOptimizer(groups, lr=LR), config=zero_config(1))
    data = iter([(torch.randn(1, 4), torch.randn(1, 4))] * 4)
    with pytest.raises(ValueError, match="1 of 2 ranks"):
        engine.train_batch(data)
