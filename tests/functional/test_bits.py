"""Element masks as bits: what is packed comes back, and zeroing changes nothing but what is off."""

import pytest
import torch

from sparsenet.functional import bits as bits_file
from sparsenet.functional.bits import mask_bytes, pack_mask, unpack_mask, without_masked, zero_masked_

SIZES = [1, 4, 8, 16, 32, 64, 128]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def masks(b, n=5, share=0.5, seed=0):
    return torch.rand(n, b, b, generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(params=["numpy", "torch"])
def way(request, monkeypatch):
    """Both ways to the bits: numpy's on the CPU, torch's where calls are recorded and on other devices."""
    if request.param == "torch":
        monkeypatch.setattr(bits_file, "_by_numpy", lambda t: False)
    return request.param


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("b", [*SIZES, 2, 3, 5])
def test_bits_hold_the_mask(b, n, way):
    mask = masks(b, n)
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8 and list(bits.shape) == [n, mask_bytes(b)] and mask_bytes(b) == -(-b * b // 8)
    back = unpack_mask(bits, b)
    assert back.dtype == torch.bool and torch.equal(back, mask)
    if n:
        back.logical_not_()  # fresh memory
        assert torch.equal(unpack_mask(bits, b), mask)


def test_the_order_of_the_bits_is_the_documented_one(way):
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 3] = mask[1, 2, 0] = mask[1, 3, 3] = True  # elements 3, 8 and 15
    assert pack_mask(mask).tolist() == [[8, 0], [0, 129]]
    assert pack_mask(torch.ones(1, 1, 1, dtype=torch.bool)).tolist() == [[1]], "bits behind the last element are 0"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, 3, 4, 16, 32])
def test_zeroing_is_exact(b, dtype, way):
    mask = masks(b, 7)
    blocks = torch.randn(7, b, b).to(dtype)
    blocks[1], blocks[2], blocks[3], blocks[4] = torch.nan, torch.inf, -torch.inf, -1.0
    before, integers = blocks.clone(), {2: torch.int16, 4: torch.int32, 8: torch.int64}[blocks.element_size()]
    copied = without_masked(blocks, pack_mask(mask))
    assert torch.equal(blocks.view(integers), before.view(integers)), "the copy has memory of its own"
    assert zero_masked_(blocks, pack_mask(mask)) is blocks
    assert torch.equal(blocks.view(integers), copied.view(integers)) and copied.is_contiguous()
    assert not blocks.view(integers)[~mask].any(), "+0, which is all bits zero"
    assert torch.equal(blocks.view(integers)[mask], before.view(integers)[mask])


def test_zeroing_in_several_chunks_strides_and_parameters(way, monkeypatch):
    monkeypatch.setattr(bits_file, "UNPACKED_AT_ONCE", 3 * 64)
    mask = masks(8, 10)
    assert torch.equal(unpack_mask(pack_mask(mask), 8), mask)
    strided = torch.randn(8, 10, 8).transpose(0, 1)
    expected = torch.where(mask, strided, 0)
    assert torch.equal(without_masked(strided, pack_mask(mask)), expected)
    assert torch.equal(zero_masked_(strided, pack_mask(mask)), expected)
    parameter = torch.nn.Parameter(torch.randn(10, 8, 8))
    version = parameter._version
    zero_masked_(parameter, pack_mask(mask))
    assert not parameter[~mask].any() and parameter[mask].all() and parameter.requires_grad
    assert parameter._version == version, "a graph that was recorded before may still run backward"


def test_both_ways_can_be_compiled_and_traced():
    mask = masks(8, 3)
    packed = pack_mask(mask)
    compiled = torch.compile(unpack_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed, 8), mask)
    traced = torch.jit.trace(lambda t: unpack_mask(t, 8), packed)
    assert torch.equal(traced(pack_mask(~mask)), ~mask), "no constant is recorded"
