"""orthogonalize() against torch.optim.Muon's function, fp64 singular value decompositions and its own promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distributed_muon.engine import newton_schulz
from distributed_muon.engine.coefficients import COEFFICIENTS, coefficient_table
from distributed_muon.engine.newton_schulz import orthogonalize, orthogonalize_stacks, power_of_two_scale_
from distributed_muon.kernels.table import KernelTable
from distributed_muon.layout import memory
from distributed_muon.layout.cost_model import choose_form, ns_flops
from distributed_muon.layout.memory import newton_schulz_elements

KELLER = (3.4445, -4.7750, 2.0315)
SQUARE = ((1, 1), (2, 2), (18, 18), (64, 64), (128, 128), (257, 257))
TALL = ((5, 1), (7, 5), (33, 17), (64, 48), (40, 3), (129, 127), (200, 64), (1000, 96), (4096, 1))
WIDE = (*((cols, rows) for rows, cols in TALL), (2, 2000))
BOTH_FORMS = pytest.mark.parametrize("form", ["standard", "gram"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(rows: int, cols: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(rows, cols, seed=seed, dtype=torch.float64))[0]


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


def cosine(x: Tensor, y: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0).item()


def nearest(matrix: Tensor) -> Tensor:
    """U V^T, in fp64."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


# ---- the bits of torch.optim.Muon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SQUARE + TALL + WIDE, ids=str)
def test_standard_form_has_the_bits_of_torch(shape, dtype):
    grad = randn(*shape, dtype=dtype) * 0.02
    expected = torch_newton_schulz(grad.clone(), KELLER, 5, 1e-7)
    assert torch.equal(orthogonalize(grad, form="standard"), expected)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_standard_form_has_the_bits_of_torch_for_any_triple_and_steps(steps):
    grad, triple = randn(48, 33), (2.0, -1.5, 0.5)
    expected = torch_newton_schulz(grad, triple, steps, 1e-7)
    assert torch.equal(orthogonalize(grad, coefficients=triple, steps=steps, form="standard"), expected)


def test_scaling_in_bf16_has_the_bits_of_scaling_in_fp32():
    """Every bf16 beside a largest entry of every size: what sinks below the normal numbers is rounded alike."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for exponent in range(-126, 127):
        scale = power_of_two_scale_(torch.tensor([2.0**exponent]))
        assert torch.equal(every * scale.bfloat16(), (every * scale.float()).bfloat16()), exponent
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(3)).bfloat16() * 1e-20
    assert torch.equal(orthogonalize(x), orthogonalize(x.float()))


def test_standard_form_of_a_stack_has_the_bits_of_torch():
    grads = randn(5, 40, 24) * torch.tensor([1e-3, 1.0, 30.0, 0.1, 1e4]).view(5, 1, 1)
    expected = torch.stack([torch_newton_schulz(grad, KELLER, 5, 1e-7) for grad in grads])
    assert torch.equal(orthogonalize(grads, form="standard"), expected)


class MatmulRecorder(TorchDispatchMode):
    """Operator, coefficients and the shape and strides of every operand and result of each matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            layouts = tuple((tuple(t.shape), t.stride()) for t in (*args, result))
            coefficients = (kwargs.get("beta", 1), kwargs.get("alpha", 1))
            self.calls.append((func.overloadpacket, *coefficients, *layouts))
        return result


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=str)
def test_standard_form_runs_the_matmuls_of_torch_on_the_same_strides(shape):
    # Strides change bits on some CPUs; equal calls keep equal bits there too.
    grad = randn(*shape)
    with MatmulRecorder() as expected:
        torch_newton_schulz(grad, KELLER, 5, 1e-7)
    with MatmulRecorder() as actual:
        orthogonalize(grad, form="standard")
    assert len(expected.calls) == 15
    assert actual.calls == expected.calls


# ---- against the singular value decomposition

RANGES = {
    "quintic": ((0.471, 1.202), (0.682, 1.134)),
    "you": ((0.475, 1.145), (0.978, 1.032)),
    "polar_express": ((0.846, 1.124), (0.870, 1.124)),
    "cans": ((0.857, 1.113), (0.861, 1.113)),
    "deepseek_v4": ((1.000, 1.001), (1.000, 1.001)),
}


@BOTH_FORMS
@pytest.mark.parametrize("least", [0, 1], ids=["1e-3", "1e-2"])
@pytest.mark.parametrize("name", RANGES)
def test_singular_values_end_in_the_range_of_the_table(name, least, form):
    spectrum = torch.cat([torch.logspace(-3 + least, -1.2, 120, dtype=torch.float64), torch.linspace(0.07, 0.2, 10)])
    spectrum = torch.cat([spectrum, (1 - spectrum.square().sum(dtype=torch.float64)).sqrt().view(1)])
    m = len(spectrum)
    matrix = orthonormal(m, m, 1) * spectrum @ orthonormal(300, m, 2).mT
    table = COEFFICIENTS[name]
    output = orthogonalize(matrix, coefficients=name, steps=len(table), form=form, dtype=torch.float64)
    values, (low, high) = singular_values(output), RANGES[name][least]
    assert low - 2e-3 < values.min() < low + 0.02
    assert high - 0.02 < values.max() < high + 2e-3
    assert cosine(output, nearest(matrix)) > 0.975


@BOTH_FORMS
@pytest.mark.parametrize("shape", [(96, 96), (200, 80), (64, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_singular_vectors_are_kept(shape, dtype, form):
    matrix = randn(*shape)
    output = orthogonalize(matrix, form=form, dtype=dtype)
    assert output.dtype == dtype
    assert cosine(output, nearest(matrix)) > 0.975
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    rotated = u.mT @ output.double() @ vh.mT
    off_diagonal = rotated - rotated.diagonal().diag()
    strong = s > 0.1 * s[0]
    bound = 0.06 if dtype == torch.bfloat16 else 1e-5
    assert off_diagonal[strong][:, strong].abs().max() < bound


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gram_form_agrees_with_the_standard_form(name, dtype):
    matrix = randn(64, 320)
    options = {"coefficients": name, "steps": len(COEFFICIENTS[name]), "dtype": dtype}
    standard = orthogonalize(matrix, form="standard", **options)
    gram = orthogonalize(matrix, form="gram", **options)
    values = {torch.bfloat16: 0.03, torch.float32: 5e-5, torch.float64: 1e-12}[dtype]
    assert (singular_values(gram) - singular_values(standard)).abs().max() < values
    assert 1 - cosine(gram, standard) < {torch.bfloat16: 1e-3, torch.float32: 1e-9, torch.float64: 1e-12}[dtype]


@BOTH_FORMS
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("decades", [0, 2, 4, 6])
def test_ill_conditioned_matrices_stay_in_range_in_bf16(name, decades, form):
    spectrum = torch.logspace(-decades, 0, 128, dtype=torch.float64)
    matrix = orthonormal(128, 128, 1) * spectrum @ orthonormal(512, 128, 2).mT
    options = {"coefficients": name, "steps": len(COEFFICIENTS[name]), "form": form}
    output, exact = orthogonalize(matrix, **options), orthogonalize(matrix, dtype=torch.float64, **options)
    assert singular_values(output).max() < 1.25
    strong = spectrum > 0.02 * spectrum.square().sum().sqrt()
    u, vh = orthonormal(128, 128, 1), orthonormal(512, 128, 2).mT
    difference = u.mT @ (output.double() - exact) @ vh.mT
    assert difference[strong][:, strong].abs().max() < 0.1


@pytest.mark.parametrize("steps", range(1, 12))
def test_gram_form_agrees_for_any_number_of_steps(steps):
    matrix = randn(12, 50)
    outputs = [orthogonalize(matrix, steps=steps, form=form, dtype=torch.float64) for form in ("standard", "gram")]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)


@BOTH_FORMS
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", [(128, 128), (64, 512), (300, 100)], ids=str)
def test_low_rank_stays_bounded_in_bf16(shape, rank, name, form):
    matrix = randn(shape[0], rank) @ randn(rank, shape[1], seed=1)
    output = orthogonalize(matrix, coefficients=name, steps=len(COEFFICIENTS[name]), form=form)
    assert output.isfinite().all()
    values = singular_values(output)
    assert values.max() < 1.3
    assert values[:rank].min() > 0.6


@BOTH_FORMS
@pytest.mark.parametrize("shape", [(1, 4096), (4096, 1), (2, 2000), (2000, 2)], ids=str)
def test_extreme_aspects(shape, form):
    matrix = randn(*shape)
    output = orthogonalize(matrix, form=form)
    values = singular_values(output)
    assert output.shape == shape and values.min() > 0.65 and values.max() < 1.2
    assert cosine(output, nearest(matrix)) > 0.99


# ---- scale


@BOTH_FORMS
@pytest.mark.parametrize("exponent", [-122, -90, -40, -1, 1, 40, 80, 122])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_power_of_two_changes_no_bit(exponent, dtype, form):
    matrix = randn(24, 60).bfloat16().float()
    expected = orthogonalize(matrix, form=form, dtype=dtype)
    scaled = matrix * 2.0**exponent
    assert torch.equal(scaled / 2.0**exponent, matrix)
    assert torch.equal(orthogonalize(scaled, form=form, dtype=dtype), expected)


@pytest.mark.parametrize("power", range(-37, 37))
def test_scale_invariance_over_fp32(power):
    matrix = randn(16, 24)
    scaled = (matrix.double() * 10.0**power).float()
    expected = orthogonalize(matrix, dtype=torch.float32)
    torch.testing.assert_close(orthogonalize(scaled, dtype=torch.float32), expected, rtol=0, atol=2e-5)
    assert 1 - cosine(orthogonalize(scaled), expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subnormal_input_is_orthogonalized(dtype):
    matrix = (randn(16, 24).double() * 2.0**-138).to(torch.float32)
    assert 0 < matrix.abs().max() < torch.finfo(torch.float32).tiny
    output = orthogonalize(matrix, dtype=dtype)
    assert output.isfinite().all()
    assert cosine(output, nearest(matrix)) > 0.95


def test_fp16_output_is_normalized_before_the_cast():
    matrix, normalized = randn(6, 10), torch.empty(6, 10, dtype=torch.float16)
    expected = (matrix / torch.linalg.vector_norm(matrix)).half()
    newton_schulz._normalize([matrix], normalized, normalized, 1e-7)
    assert torch.equal(normalized, expected)
    for scale in (1e-9, 1e3, 1e30):
        output = orthogonalize(matrix * scale, dtype=torch.float16)
        assert output.dtype == torch.float16
        assert cosine(output, nearest(matrix)) > 0.96


@pytest.mark.parametrize("sign", [1, -1])
def test_entries_of_one_sign_are_scaled_too(sign):
    matrix = randn(5, 9).abs() * sign
    matrix[0, 0] = 0.0
    assert torch.equal(orthogonalize(matrix * 2.0**-100), orthogonalize(matrix))


def test_power_of_two_scale():
    largest = torch.tensor([1.0, 1.99, 3.0, 2.0**-126, 2.0**127, 0.0, 1e-45, math.inf, math.nan])
    expected = [1.0, 1.0, 0.5, 2.0**126, 2.0**-126, 2.0**126, 2.0**126, 2.0**-126, 2.0**-126]
    assert power_of_two_scale_(largest.bfloat16()).tolist() == expected
    assert power_of_two_scale_(largest).tolist() == expected


@BOTH_FORMS
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_zero_gives_zero(form, eps):
    for shape in ((5, 8), (3, 8, 5)):
        assert orthogonalize(torch.zeros(shape), form=form, eps=eps).count_nonzero() == 0


@BOTH_FORMS
def test_eps_touches_only_the_zero_matrix(form):
    matrix = randn(6, 9) * 1e-20
    assert torch.equal(orthogonalize(matrix, form=form, eps=1e-1), orthogonalize(matrix, form=form, eps=1e-30))


@BOTH_FORMS
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_reach_the_output_of_their_matrix_alone(poison, form):
    grads = randn(3, 6, 10)
    expected = orthogonalize(grads, form=form)
    grads[1, 2, 3] = poison
    output = orthogonalize(grads, form=form)
    assert output[1].isnan().all()
    assert torch.equal(output[::2], expected[::2])


# ---- stacks, strides, aliasing


class Transposing(TorchDispatchMode):
    """Counts copies between tensors of different strides."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].squeeze().stride() != args[1].squeeze().stride()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("shape", [(2000, 96), (96, 2000)])  # too large to share a batch
def test_gram_form_transposes_no_matrix(shape):
    matrix = randn(*shape)
    with Transposing() as copies:
        orthogonalize(matrix, form="gram", dtype=torch.float32, out=torch.empty(shape))
    assert copies.count == 0


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("shape", [(6, 8, 6), (8, 8, 8), (7, 4, 12), (1, 5, 5)], ids=str)
def test_a_stack_equals_a_loop(shape, form):
    scales = torch.logspace(-12, 12, shape[0]).view(-1, 1, 1)
    stack = randn(*shape) * scales
    output = orthogonalize(stack, form=form)
    loop = torch.stack([orthogonalize(matrix, form=form) for matrix in stack])
    if form == "standard":
        assert torch.equal(output, loop)
    torch.testing.assert_close(output, loop, rtol=0, atol=0.02)
    for matrix, result in zip(stack, output, strict=True):
        assert cosine(result, nearest(matrix)) > 0.9


@pytest.mark.parametrize("shape", [(10, 6, 9), (10, 9, 6), (10, 4, 40)], ids=str)
def test_batches_cover_the_stack_and_its_remainder(monkeypatch, shape):
    stack = randn(*shape)
    expected = torch.stack([orthogonalize(matrix, dtype=torch.float32) for matrix in stack])
    for batch in (1, 3, 4, 10):
        monkeypatch.setitem(memory.BATCH_NUMEL, "cpu", batch * shape[1] * shape[2])
        torch.testing.assert_close(orthogonalize(stack, dtype=torch.float32), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
@pytest.mark.parametrize("sides", [(24, 30), (8, 40)], ids=str)  # the standard form, and "gram"
@pytest.mark.parametrize("batch", [2, 4, 100])
def test_wide_and_tall_stacks_share_batches_in_place(monkeypatch, batch, sides, steps):
    monkeypatch.setitem(memory.BATCH_NUMEL, "cpu", batch * math.prod(sides))
    table, kernels = coefficient_table("quintic", steps), KernelTable("cpu", "nothing", ())
    stacks = [randn(3, *sides), randn(4, *sides[::-1], seed=1), randn(1, *sides, seed=2)]
    expected = torch.cat([orthogonalize(stack, steps=steps, dtype=torch.float64).view(-1) for stack in stacks])
    flat = torch.cat([stack.double().view(-1) for stack in stacks])
    parts = flat.split([stack.numel() for stack in stacks])
    views = [part.view(stack.shape) for part, stack in zip(parts, stacks, strict=True)]
    needed = newton_schulz_elements(*sides, 8, choose_form(*sides, steps) == "gram", batch)
    scratch = torch.full((needed + 32,), math.nan, dtype=torch.float64)
    orthogonalize_stacks(views, flat, table, form="auto", eps=1e-7, kernels=kernels, scratch=scratch)
    torch.testing.assert_close(flat, expected, rtol=0, atol=1e-9)
    assert scratch[needed:].isnan().all() and not scratch[:needed].isnan().all()
    only_wide = views[0].clone()
    orthogonalize_stacks([only_wide], only_wide.view(-1), table, form="auto", eps=1e-7, kernels=kernels)
    torch.testing.assert_close(only_wide, orthogonalize(views[0], steps=steps, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("form", "products"), [("auto", 15), ("standard", 15 * 16)])
def test_small_matrices_share_batched_matmuls(form, products):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(randn(16, 128, 128), form=form)
    assert counter.get_total_flops() == 16 * ns_flops(128, 128, 5, "standard")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        orthogonalize(randn(16, 128, 128), form=form)
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    assert sum(event.count for event in profile.key_averages() if event.key in names) == products


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6), (4, 6, 9), (1, 6, 9)], ids=str)
def test_the_input_is_neither_written_nor_aliased(shape, dtype, form):
    matrix = randn(*shape, dtype=dtype)
    before = matrix.clone()
    output = orthogonalize(matrix, form=form, dtype=dtype)
    assert output.dtype == dtype and output.shape == matrix.shape and output.is_contiguous()
    output.zero_()
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
def test_strided_input(form):
    base = randn(12, 10, 14)
    for view in (
        base[0].t(),
        base[1, ::2, 1::3],
        base[2, :1].expand(10, 14),
        base.mT,
        base[::3],
        base.permute(2, 0, 1),
    ):
        output = orthogonalize(view, form=form, dtype=torch.float32)
        expected = orthogonalize(view.contiguous(), form=form, dtype=torch.float32)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 4, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(shape, form):
    output = orthogonalize(torch.empty(shape), form=form)
    assert output.shape == shape and output.dtype == torch.bfloat16


def test_parameters_give_a_plain_tensor():
    output = orthogonalize(torch.nn.Parameter(randn(6, 9)))
    assert not output.requires_grad


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
def test_deterministic_algorithms(form):
    stack = randn(5, 6, 20)
    expected = orthogonalize(stack, form=form)
    torch.use_deterministic_algorithms(True)
    try:
        output = orthogonalize(stack, form=form)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(output, expected)


# ---- forms and their cost


@BOTH_FORMS
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 30)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 10])
def test_flops_are_those_of_the_matmuls(shape, steps, form):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(randn(*shape), steps=steps, form=form)
    assert counter.get_total_flops() == ns_flops(*shape, steps, form)


def test_flops_of_five_steps_in_closed_form():
    m, r = 64, 4
    assert ns_flops(m, r * m, 5, "standard") == (20 * r + 10) * m**3
    assert ns_flops(r * m, m, 5, "gram") == (12 * r + 22) * m**3


def test_auto_takes_the_gram_form_on_long_matrices_only():
    assert [choose_form(*shape, 5) for shape in ((1024, 1024), (1408, 2048), (2048, 1408))] == ["standard"] * 3
    assert [choose_form(*shape, 5) for shape in ((1024, 2816), (2816, 1024), (576, 2048))] == ["gram"] * 3
    assert choose_form(64, 128, 5) == "standard" and choose_form(64, 256, 5) == "gram"
    assert choose_form(512, 4096, 2) == "standard" and choose_form(512, 4096, 3) == "gram"
    assert choose_form(0, 10, 5) == "standard"
    with FlopCounterMode(display=False) as counter:
        orthogonalize(randn(32, 160))
    assert counter.get_total_flops() == ns_flops(32, 160, 5, "gram")


# ---- coefficients and errors


def test_coefficient_tables():
    assert coefficient_table("quintic", 5) == (KELLER,) * 5 == coefficient_table(KELLER, 5)
    assert coefficient_table("you", 3) == COEFFICIENTS["you"][:3]
    assert coefficient_table("cans", 7) == COEFFICIENTS["cans"] + COEFFICIENTS["cans"][-1:] * 2
    assert coefficient_table([KELLER, (2, -1.5, 0.5)], 3) == (KELLER, (2.0, -1.5, 0.5), (2.0, -1.5, 0.5))
    assert coefficient_table("deepseek_v4", None) == (KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2
    a, b, c = coefficient_table("polar_express", 1)[0]
    assert a * 1.01 == pytest.approx(8.28721201814563)
    assert b * 1.01**3 == pytest.approx(-23.595886519098837)
    assert c * 1.01**5 == pytest.approx(17.300387312530933)


@pytest.mark.parametrize("bad", ["Quintic", "", (), (1.0, 2.0), [(1.0, 2.0)], [KELLER, 3.0], 3.0, None, [[]]], ids=str)
def test_bad_coefficients_name_the_tables(bad):
    with pytest.raises(ValueError, match="quintic, you, polar_express, cans, deepseek_v4") as error:
        coefficient_table(bad, 5)
    assert "\n" not in str(error.value) and "ns_coefficients" in str(error.value)


@pytest.mark.parametrize("steps", [0, -1, 100, 2.5, "5"])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="ns_steps"):
        coefficient_table("quintic", steps)


@pytest.mark.parametrize(
    ("matrices", "options", "message"),
    [
        (torch.zeros(3), {}, "matrices has shape"),
        (torch.zeros(2, 2, 2, 2), {}, "matrices has shape"),
        (torch.zeros(2, 2, dtype=torch.int32), {}, "matrices has dtype"),
        (torch.zeros(2, 2), {"form": "fast"}, "ns_form='fast'"),
        (torch.zeros(2, 2), {"dtype": torch.int8}, "ns_dtype=torch.int8"),
        (torch.zeros(2, 2), {"coefficients": "fast"}, "ns_coefficients='fast'"),
        (torch.zeros(2, 2), {"steps": 0}, "ns_steps=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_option(matrices, options, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(matrices, **options)
