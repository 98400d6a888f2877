"""Triton kernels and orthogonalize() on a CUDA device against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_muon import kernels
from distributed_muon.engine.newton_schulz import orthogonalize
from distributed_muon.kernels.table import SHIPPED, KernelTable
from tests.symmetric_products import symmetric_addmm_reference, xxt_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.fixture
def symmetric():
    pytest.importorskip("triton", reason="triton is not installed")
    from distributed_muon.kernels import symmetric

    return symmetric


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (65, 130), (512, 1000), (1000, 512), (3, 200, 77), (1408, 2048)], ids=str)
def test_xxt(symmetric, shape, dtype):
    x = (randn(*shape) / shape[-1] ** 0.5).to(dtype)
    expected = xxt_reference(x)
    torch.testing.assert_close(symmetric.xxt(x), expected, rtol=2e-2, atol=1e-3)
    wide = (randn(*shape[:-1], 2 * shape[-1]) / shape[-1] ** 0.5).to(dtype)[..., ::2]
    torch.testing.assert_close(symmetric.xxt(wide), xxt_reference(wide), rtol=2e-2, atol=1e-3)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (65, 65), (1000, 1000), (3, 200, 200)], ids=str)
def test_symmetric_polynomial(symmetric, shape, dtype):
    a = xxt_reference((randn(*shape) / (2 * shape[-1] ** 0.5)).to(dtype))
    expected = symmetric_addmm_reference(a, a, a, beta=-4.775, alpha=2.0315)
    torch.testing.assert_close(
        symmetric.symmetric_addmm(a, a, a, beta=-4.775, alpha=2.0315), expected, rtol=2e-2, atol=4e-3
    )


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("shape", [(512, 512), (600, 2000), (2000, 600), (3, 700, 1500), (20, 128, 128)], ids=str)
def test_orthogonalize_agrees_with_the_cpu(shape, form):
    matrices = randn(*shape)
    # fp32 on the CPU: the exact polynomial, as far as bf16 is concerned.
    expected = orthogonalize(matrices.cpu(), form="standard", dtype=torch.float32)
    output = orthogonalize(matrices, form=form)
    assert output.is_cuda and output.dtype == torch.bfloat16 and output.is_contiguous()
    cosine = torch.nn.functional.cosine_similarity(output.cpu().float().flatten(), expected.flatten(), dim=0)
    assert cosine > 0.998
    assert torch.linalg.matrix_norm(output.float(), ord=2).max() < 1.25


def test_triton_is_used_where_it_pays(symmetric):
    table = KernelTable.load(None, torch.device("cuda"))
    large = torch.empty(1024, 1024, dtype=torch.bfloat16, device="cuda")
    xxt, addmm = kernels.products_of(large, table)
    assert (xxt.func, addmm.func) == (symmetric.xxt, symmetric.symmetric_addmm)
    assert kernels.products_of(large[:64], table) == kernels.FULL
    assert kernels.products_of(large.float(), table) == kernels.FULL


@pytest.mark.parametrize("size", [512, 1000, 2048])
def test_every_config_of_the_shipped_table_runs(symmetric, size):
    x = (randn(size, size) / size**0.5).bfloat16()
    for rule in SHIPPED["cuda"].rules:
        assert rule.config is not None
        out = symmetric.xxt(x, config=symmetric.Config(*rule.config))
        torch.testing.assert_close(out, xxt_reference(x), rtol=2e-2, atol=1e-3)
