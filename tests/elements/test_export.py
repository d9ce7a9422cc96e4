"""torch's 2:4 format: what is missing is said, and torch's own converter takes the weight that would be handed over."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import sparsenet as sn
from sparsenet.elements import to_semi_structured


def layer_of(mask="2:4", inp=128, out=64, dtype=torch.float16, **options):
    return sn.SparseLinear(inp, out, density=0.5, block_size=16, element_mask=mask, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["2:4", "1:4", "1:2", "2:8", "1:16"])
def test_torchs_converter_takes_the_weight_and_gives_it_back(rule, dtype):
    layer = layer_of(rule, dtype=dtype)
    weight = layer.to_linear().weight.detach()
    assert weight.count_nonzero() == layer.num_active
    assert (weight.reshape(64, 32, 4) != 0).sum(2).max() <= 2
    half, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert half.shape == (64, 64) and torch.equal(sparse_semi_structured_to_dense_cutlass(half, meta), weight)


def test_a_weight_that_is_not_2_to_4_does_not_survive_the_converter():
    """So the test above can fail."""
    weight = layer_of("3:4").to_linear().weight.detach()
    half, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(half, meta), weight)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: layer_of(None), "layer must follow a rule that implies 2:4, got none"),
        (lambda: layer_of(0.5), "layer must follow a rule that implies 2:4, got none"),
        (lambda: layer_of("3:4"), "layer must follow a rule that implies 2:4, got 3:4"),
        (lambda: layer_of("4:8"), "layer must follow a rule that implies 2:4, got 4:8"),
        (lambda: layer_of(dtype=torch.float32), "layer must be float16 or bfloat16, got torch.float32"),
        (lambda: layer_of(inp=120), "layer must have a multiple of .* outputs and of .* inputs, got 64 and 120"),
        (lambda: layer_of(out=40), "layer must have a multiple of .* outputs and of .* inputs, got 40 and 128"),
        (layer_of, r"layer must be on a CUDA device of capability 8\.0 or more, got cpu"),
    ],
)
def test_what_is_missing_is_said(layer, message):
    layer = layer()
    for call in (layer.to_semi_structured, lambda: to_semi_structured(layer)):
        with pytest.raises(ValueError, match=f"^to_semi_structured: {message}$"):
            call()
