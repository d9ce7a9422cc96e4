"""What the native module says of itself and of the scratch memory its operations take."""

import pytest
import torch

import sparsenet as sn
from sparsenet.functional import (
    block_gradient_squared_norms,
    linear_workspace,
    native_build_info,
    norms_workspace,
    trim_workspace,
    workspace_bytes,
)

CASES = [((512, 768), 32, 256), ((100, 70), 16, 3), ((1000, 300), 64, 128)]  # (out, in), block size, batch


@pytest.fixture(autouse=True)
def nothing_kept():
    """Other tests of this process leave scratch memory behind, which would be used again."""
    trim_workspace()
    yield
    trim_workspace()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "block_size", "batch"), CASES)
def test_predicted_scratch_memory_is_what_forward_and_backward_take(shape, block_size, batch, dtype, threads):
    torch.set_num_threads(threads)
    layer = sn.SparseLinear(shape[1], shape[0], density=0.3, block_size=block_size, dtype=dtype)
    before = workspace_bytes()
    layer(torch.randn(batch, shape[1], dtype=dtype, requires_grad=True)).sum().backward()
    buffers = linear_workspace(dtype, shape, block_size, layer.pattern.num_blocks, batch, threads)
    assert workspace_bytes() - before == sum(buffers) > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block_size", "batch"), CASES)
def test_predicted_scratch_memory_is_what_block_norms_take(shape, block_size, batch, dtype, threads):
    torch.set_num_threads(threads)
    before = workspace_bytes()
    x, grad_output = (torch.randn(batch, features, dtype=dtype) for features in reversed(shape))
    block_gradient_squared_norms(x, grad_output, block_size)
    buffers = norms_workspace(dtype, shape, block_size, batch, -(-shape[0] // block_size), threads)
    assert workspace_bytes() - before == sum(buffers) > 0


def test_build_info_says_what_was_built_and_what_runs():
    info = native_build_info()
    assert info["version"] == sn.__version__ and info["version"].count(".") == 2
    assert isinstance(info["cuda_archs"], list)
    assert {**info, **sn.build_info()} == sn.build_info()
