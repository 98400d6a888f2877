"""Symmetric products: row panels here, Triton kernels in a process of their own under Triton's interpreter.

The interpreter must be chosen before Triton is imported, hence the process: `python -m tests.unit.test_kernels`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed_muon import DistributedMuon, kernels
from distributed_muon.engine.newton_schulz import orthogonalize
from distributed_muon.engine.step import ShardedStep
from distributed_muon.kernels import panels
from distributed_muon.kernels.table import PRODUCTS, SHIPPED, KernelTable, Rule
from distributed_muon.layout.cost_model import ns_flops
from perf import newton_schulz
from tests.symmetric_products import symmetric_addmm_reference, xxt_reference

SHAPES = ((1, 1), (5, 7), (16, 16), (33, 17), (48, 80), (2, 20, 40), (3, 35, 9))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def commuting(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three polynomials of one symmetric matrix."""
    a = randn(*shape) / shape[-1] ** 0.5
    a = (a + a.mT) / 2
    eye = torch.eye(shape[-1]).expand(shape)
    return a, 2 * eye - 3 * a, eye + 0.5 * a @ a


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-3, atol=atol)


# ---- row panels


@pytest.fixture
def narrow_panels(monkeypatch):
    monkeypatch.setattr(panels, "MIN_WIDTH", 4)
    rules = tuple(Rule(product, 8, 0, "panels") for product in PRODUCTS)
    monkeypatch.setitem(SHIPPED, "cpu", KernelTable("cpu", "for tests", rules))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_panels_equal_full_products(narrow_panels, shape):
    x = randn(*shape)
    rows = shape[-2]
    out = torch.full((*shape[:-1], rows), float("nan"))
    close(panels.xxt(x, out=out), x @ x.mT)
    start, left, right = commuting(*shape[:-1], rows)
    out.fill_(float("nan"))
    close(panels.symmetric_addmm(start, left, right, beta=-0.5, alpha=2.0, out=out), 2 * left @ right - 0.5 * start)


def test_panels_mirror_what_is_right_of_the_diagonal(narrow_panels):
    start, x, y = (randn(32, 32, seed=seed) for seed in range(3))
    out = panels.symmetric_addmm(start, x, y, beta=1.0, out=torch.empty(32, 32))
    close(out[:8, 8:], (start + x @ y)[:8, 8:])
    assert torch.equal(out[8:, :8], out[:8, 8:].mT)


def test_panels_save_flops(narrow_panels):
    x, out = randn(64, 40), torch.empty(64, 64)
    with FlopCounterMode(display=False) as counter:
        panels.xxt(x, out=out)
    assert counter.get_total_flops() == 2 * 64 * 64 * 40 * 5 // 8


@pytest.mark.parametrize("form", ["gram", "auto"])
@pytest.mark.parametrize("shape", [(33, 40), (40, 33), (4, 16, 90)], ids=str)
def test_orthogonalize_by_panels(narrow_panels, monkeypatch, shape, form):
    x = randn(*shape)
    with FlopCounterMode(display=False) as counter:
        output = orthogonalize(x, form=form, dtype=torch.float32)
    assert counter.get_total_flops() < 0.9 * x[..., 0, 0].numel() * ns_flops(*shape[-2:], 5, "standard")
    full = orthogonalize(x, form=form, dtype=torch.float32, kernels=KernelTable("cpu", "nothing", ()))
    close(output, full, atol=1e-4)


def test_standard_form_never_takes_panels(narrow_panels):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(randn(40, 40), form="standard")
    assert counter.get_total_flops() == ns_flops(40, 40, 5, "standard")


# ---- which products


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("amx", "dtype", "shape", "xxt", "addmm"),
    [
        (False, BF16, (511, 8), False, False),
        (False, BF16, (512, 8), True, True),
        (True, FP32, (512, 8), True, True),
        (True, BF16, (1024, 1024), False, False),
        (True, BF16, (1024, 2048), True, False),
        (True, BF16, (2048, 2048), True, True),
    ],
)
def test_the_shipped_table_of_cpus_knows_amx(monkeypatch, amx, dtype, shape, xxt, addmm) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    chosen = kernels.products_of(torch.empty(shape, dtype=dtype), KernelTable.load(None, torch.device("cpu"), dtype))
    assert chosen.xxt == (panels.xxt if xxt else kernels.FULL.xxt)
    assert chosen.addmm == (panels.symmetric_addmm if addmm else kernels.FULL.addmm)


def test_the_shipped_table_is_of_the_dtype_that_is_iterated_in(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setitem(
        SHIPPED, "cpu", KernelTable("cpu", "for tests", tuple(Rule(p, 8, 0, "panels") for p in PRODUCTS))
    )
    monkeypatch.setattr(panels, "MIN_WIDTH", 4)
    flops = {}
    for dtype in (FP32, BF16):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(randn(33, 40), form="auto", dtype=dtype)
        flops[dtype] = counter.get_total_flops()
    assert flops[FP32] < 0.9 * flops[BF16] == 0.9 * ns_flops(33, 40, 5, "standard")


def test_the_largest_rule_that_fits_decides() -> None:
    rules = (Rule("xxt", 64, 0, "panels"), Rule("xxt", 64, 256, "matmul"), Rule("xxt", 512, 1024, "panels"))
    table = KernelTable("cpu", "for tests", rules)
    chosen = {shape: table.rule("xxt", *shape)[1:3] for shape in ((63, 900), (64, 255), (600, 600), (512, 1024))}
    assert chosen == {(63, 900): (0, 0), (64, 255): (64, 0), (600, 600): (64, 256), (512, 1024): (512, 1024)}
    assert table.rule("addmm", 4096, 4096).kernel == "matmul"


def test_cpu_tensors_get_no_triton(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "triton_available", lambda: True)
    x = torch.empty(1024, 8, dtype=torch.bfloat16)
    assert kernels.products_of(x, SHIPPED["cuda"]) == kernels.FULL


def test_a_table_is_read_at_construction_and_named_where_it_is_wrong(tmp_path) -> None:
    path = tmp_path / "table.json"
    rule = {"product": "xxt", "rows": 8, "cols": 8, "kernel": "panels", "config": None, "seconds": {"panels": 1e-3}}
    path.write_text(json.dumps({"cpu": {"measured": "here", "rules": [rule]}}))
    param = torch.nn.Parameter(randn(40, 48))
    optimizer = DistributedMuon([param], ns_table=str(path))
    (engine,) = (value for value in vars(optimizer).values() if isinstance(value, ShardedStep))
    path.unlink()  # not read again
    assert engine.kernels.rules == (Rule("xxt", 8, 8, "panels"),) and engine.kernels.source != "shipped"
    with mock.patch.object(panels, "xxt", wraps=panels.xxt) as taken:
        param.grad = randn(40, 48, seed=1)
        optimizer.step()
    assert taken.call_count == 5, "once an iteration"
    for text, says in (
        (None, "No such file"),
        ("[", "is no kernel table"),
        (json.dumps({"A100": {}}), "has nothing for 'cpu': run python -m perf.newton_schulz --tune"),
        (json.dumps({"cpu": {"measured": "", "rules": [{**rule, "kernel": "quack"}]}}), "'xxt' by 'quack' is unknown"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=r"ns_table=.*table\.json") as error:
            DistributedMuon([torch.nn.Parameter(randn(4, 4))], ns_table=str(path))
        assert says in str(error.value) and "\n" not in str(error.value)


def test_tuning_writes_the_fastest_beside_what_other_devices_have(tmp_path, capsys) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"A100": {"measured": "there", "rules": []}}))
    words = ["newton_schulz", "--tune", str(path), "--shapes", "64x96", "600x600", "--rounds", "2"]
    with mock.patch.object(sys, "argv", words):
        newton_schulz.main()
    written = json.loads(path.read_text())
    assert written["A100"]["measured"] == "there" and "torch" in written["cpu"]["measured"]
    rules = written["cpu"]["rules"]
    assert [(r["product"], r["rows"], r["cols"]) for r in rules] == [
        ("xxt", 64, 96), ("addmm", 64, 64), ("xxt", 600, 600), ("addmm", 600, 600),
    ]  # fmt: skip
    for rule in rules:
        assert rule["seconds"][rule["kernel"]] == min(rule["seconds"].values()) > 0
        assert set(rule["seconds"]) == {"matmul", "panels"}
    assert len(KernelTable.load(path, torch.device("cpu")).rules) == 4
    assert "600x600" in capsys.readouterr().out
    path.write_text("[")
    with mock.patch.object(sys, "argv", words), pytest.raises(SystemExit):
        newton_schulz.main()
    assert "is no kernel table: name another file" in capsys.readouterr().err


def test_triton_kernels_refuse_cpu_tensors():
    pytest.importorskip("triton", reason="triton is not installed")
    from distributed_muon.kernels import symmetric

    a = torch.eye(4)
    for call in (lambda: symmetric.xxt(a), lambda: symmetric.symmetric_addmm(a, a, a, beta=1.0)):
        with pytest.raises(ValueError, match=r"tensor on cpu: it is a GPU kernel"):
            call()


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from distributed_muon import kernels;"
        "from distributed_muon.engine import newton_schulz;"
        "newton_schulz.orthogonalize(torch.ones(3, 4)); assert not kernels.triton_available();"
        "assert 'distributed_muon.kernels.symmetric' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- Triton kernels, interpreted


def check_xxt() -> None:
    from distributed_muon.kernels import symmetric

    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            x = randn(*shape).to(dtype)
            close(symmetric.xxt(x), xxt_reference(x))
            close(symmetric.xxt(x, config=symmetric.Config(32, 16, 2, 2)), xxt_reference(x))


def check_symmetric_addmm() -> None:
    from distributed_muon.kernels import symmetric

    for shape in ((1, 1), (17, 17), (40, 40), (2, 20, 20)):
        start, x, y = commuting(*shape)
        expected = symmetric_addmm_reference(start, x, y, beta=-0.5, alpha=2.0)
        close(expected, 2 * x @ y - 0.5 * start)
        close(symmetric.symmetric_addmm(start, x, y, beta=-0.5, alpha=2.0), expected)


def check_symmetric_polynomial() -> None:
    from distributed_muon.kernels import symmetric

    for shape in ((1, 1), (17, 17), (40, 40), (2, 20, 20)):
        for dtype in (torch.float32, torch.float16):
            a = commuting(*shape)[0].to(dtype)
            expected = symmetric_addmm_reference(a, a, a, beta=-4.775, alpha=2.0315)
            close(expected, -4.775 * a.float() + 2.0315 * a.float() @ a.float(), atol=5e-3)
            close(symmetric.symmetric_addmm(a, a, a, beta=-4.775, alpha=2.0315), expected, atol=5e-3)


def check_only_the_lower_tiles_are_computed() -> None:
    from distributed_muon.kernels import symmetric

    start, x, y = (randn(32, 32, seed=seed) for seed in range(3))
    out = symmetric.symmetric_addmm(start, x, y, beta=1.0)
    assert torch.equal(out[:16, 16:], out[16:, :16].mT)
    close(out[16:, :16], (start + x @ y.mT)[16:, :16])


def check_strides_and_edges() -> None:
    from distributed_muon.kernels import symmetric

    # Nothing beyond the edges is read (nan would spread) or written (nan must stay).
    frame = torch.full((3, 40, 60), float("nan"))
    frame[:2, :21, 3:40] = randn(2, 21, 37)
    x = frame[:2, :21, 3:40]
    target = torch.full((3, 30, 30), float("nan"))
    out = symmetric.xxt(x, target[:2, :21, :21])
    close(out, xxt_reference(x))
    assert out.data_ptr() == target.data_ptr()
    assert target[:2, 21:].isnan().all() and target[:2, :, 21:].isnan().all() and target[2].isnan().all()
    close(symmetric.xxt(x[0].t()), x[0].t() @ x[0])
    close(symmetric.xxt(x[:, ::2, ::3]), xxt_reference(x[:, ::2, ::3]))
    assert symmetric.xxt(torch.empty(0, 4)).shape == (0, 0)
    assert symmetric.xxt(torch.empty(4, 0)).count_nonzero() == 0


def check_errors() -> None:
    from distributed_muon.kernels import symmetric

    x = torch.ones(4, 6)
    for call, message in (
        (lambda: symmetric.xxt(x.bfloat16()), "give float16 or float32"),
        (lambda: symmetric.xxt(x[0]), "2-D or stacked"),
        (lambda: symmetric.xxt(x, torch.empty(6, 6)), "of shape (4, 4)"),
        (lambda: symmetric.xxt(x, torch.empty(4, 4, dtype=torch.float16)), "want torch.float32"),
        (lambda: symmetric.symmetric_addmm(x, x, x, beta=1.0), "of shape (4, 4)"),
    ):
        try:
            call()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error says {message!r}")


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@functools.cache
def interpreted_results() -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_triton_kernels_interpreted(name):
    if not kernels.triton_available():
        pytest.skip("triton is not installed")
    assert interpreted_results()[name] == "ok"


if __name__ == "__main__":
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))
