"""What is taken for an operand: tensors of every kind, arrays and lists; the right value or one sentence."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear
from sparsenet.functional import block_gradient_squared_norms, block_sparse_linear, candidate_gradients

PLAIN = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Bare(torch.Tensor):
    """A subclass that changes nothing."""


def _quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecations of torch
        return make()


def masked():
    from torch.masked import masked_tensor

    return masked_tensor(PLAIN, PLAIN > 0)


KINDS = {
    "sparse_coo": lambda: PLAIN.to_sparse(),
    "sparse_csr": lambda: PLAIN.to_sparse_csr(),
    "sparse_bsr": lambda: PLAIN.to_sparse_bsr((2, 2)),
    "a nested tensor": lambda: torch.nested.nested_tensor([PLAIN, PLAIN[:2]]),
    "a nested tensor ": lambda: torch.nested.nested_tensor([PLAIN, PLAIN[:2]], layout=torch.jagged),
    "_mkldnn": lambda: PLAIN.to_mkldnn(),
    "torch.qint8": lambda: torch.quantize_per_tensor(PLAIN, 0.1, 0, torch.qint8),
    "torch.complex64": lambda: PLAIN.to(torch.complex64),
    "torch.int32": lambda: PLAIN.int(),
    "torch.bool": lambda: PLAIN > 0,
    "torch.float8_e4m3fn": lambda: PLAIN.to(torch.float8_e4m3fn),
    "MaskedTensor": masked,
}


@pytest.mark.parametrize("kind", KINDS)
def test_row83_tensors_that_are_not_ordinary_are_a_sentence(kind):
    """Some of them have no memory: reading it would end the process."""
    odd, grad = _quietly(KINDS[kind]), torch.randn(4, 32)
    layer = SparseLinear(64, 32, density=0.5, block_size=16)
    for action, argument in (
        (lambda: layer(odd), "block_sparse_linear: x"),
        (lambda: torch.no_grad()(layer)(odd), "block_sparse_linear: x"),
        (lambda: block_gradient_squared_norms(odd, grad, 16), "block_gradient_squared_norms: x"),
        (lambda: candidate_gradients(odd, grad, [0], [0], 16), "candidate_gradients: x"),
        (lambda: BlockPattern.from_dense(odd, 0.5, 16), "BlockPattern: weight"),
    ):
        with pytest.raises(TypeError, match=f"^{argument} must be .*, got .*{kind.strip()}$"):
            action()
    with pytest.raises(TypeError, match="^block_gradient_squared_norms: grad_output must .*, got "):
        block_gradient_squared_norms(PLAIN, odd, 16)
    assert layer(PLAIN).shape == (4, 32)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_row83_values_and_bias_that_are_not_ordinary_are_a_sentence(change):
    layer = SparseLinear(64, 32, density=0.5, block_size=16)
    values, bias = layer.values.detach(), torch.randn(32)
    with pytest.raises(TypeError, match="block_sparse_linear: values must be an ordinary dense tensor, got torch"):
        block_sparse_linear(PLAIN, change(values), layer.pattern)
    with pytest.raises(TypeError, match="block_sparse_linear: bias must be an ordinary dense tensor, got torch"):
        block_sparse_linear(PLAIN, values, layer.pattern, change(bias))
    with pytest.raises(TypeError, match=r"block_sparse_linear: values must be a torch.Tensor, got ndarray"):
        block_sparse_linear(PLAIN, values.numpy(), layer.pattern)


def test_row83_a_plain_subclass_of_tensor_computes():
    layer, x, grad = SparseLinear(64, 32, density=0.5, block_size=16), PLAIN.as_subclass(Bare), torch.randn(4, 32)
    y = layer(x)
    assert type(y) is Bare and torch.equal(y.as_subclass(torch.Tensor), layer(PLAIN))
    expected = block_gradient_squared_norms(PLAIN, grad, 16)
    assert torch.equal(block_gradient_squared_norms(x, grad.as_subclass(Bare), 16), expected)


ARRAYS = {
    "array": lambda t: t.numpy(),
    "another byte order": lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder()),
    "backwards": lambda t: t.flip(0).contiguous().numpy()[::-1],
    "read-only": lambda t: np.frombuffer(t.numpy().tobytes(), t.numpy().dtype).reshape(t.shape),
    "lists": lambda t: t.tolist(),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_row83_arrays_and_lists_serve_as_data_and_indices(form):
    of = ARRAYS[form]
    pattern = BlockPattern([0, 1, 2], [1, 0], (64, 64), 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BlockPattern(of(torch.tensor([0, 1, 2])), of(torch.tensor([1, 0])), (64, 64), 32) == pattern
        assert BlockPattern.from_places(of(torch.tensor([1, 0])), of(torch.tensor([0, 1])), (64, 64), 32) == pattern
        assert BlockPattern.from_mask(of(pattern.to_mask()), 32) == pattern
        weight = torch.randn(64, 64)
        assert BlockPattern.from_dense(of(weight), 0.5, 16) == BlockPattern.from_dense(weight, 0.5, 16)
        mask = torch.rand(2, 32, 32) < 0.5
        layer = SparseLinear(64, 64, pattern=pattern, element_mask=of(mask))
        assert torch.equal(layer.element_mask, mask)
        values = torch.randn(2, 32, 32)
        layer = SparseLinear(64, 64, pattern=pattern)
        layer.set_pattern(pattern, of(values))
        torch.testing.assert_close(layer.values.detach(), values)
        x, grad = torch.randn(3, 64), torch.randn(3, 64)
        got = block_gradient_squared_norms(of(x), of(grad), 32)
        torch.testing.assert_close(got, block_gradient_squared_norms(x, grad, 32))
        block = candidate_gradients(x, grad, of(torch.tensor([1])), of(torch.tensor([0])), 32)
        assert torch.equal(block, candidate_gradients(x, grad, torch.tensor([1]), torch.tensor([0]), 32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int64])
def test_row83_indices_of_every_integer_type(dtype):
    made = BlockPattern(np.array([0, 1, 2], dtype), np.array([1, 0], dtype), (64, 64), 32)
    assert made == BlockPattern([0, 1, 2], [1, 0], (64, 64), 32)


def test_row83_unsigned_indices_are_never_truncated():
    for value in (2**32, 2**63 + 1):
        with pytest.raises(ValueError, match="BlockPattern: col_indices must fit in int32, got"):
            BlockPattern([0, 1, 2], np.array([0, value], np.uint64), (64, 64), 32)


@pytest.mark.parametrize("wrong", [None, "weights", {1: 2}, np.array(["a"]), [[1.0], [2.0, 3.0]]])
def test_row83_what_is_no_array_is_a_sentence(wrong):
    for action, argument in (
        (lambda: BlockPattern.from_dense(wrong, 0.5), "BlockPattern: weight"),
        (lambda: BlockPattern.from_mask(wrong), "BlockPattern: block_mask"),
        (lambda: BlockPattern([0, 1], wrong, (8, 8), 8), "BlockPattern: col_indices"),
        (lambda: block_gradient_squared_norms(wrong, PLAIN, 8), "block_gradient_squared_norms: x"),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be a tensor, an array or lists of numbers, got"):
            action()


def test_row83_a_layer_of_a_sparsified_model_says_the_same():
    model = nn.Sequential(nn.Linear(64, 32))
    sn.sparsify_(model, 0.5, 16)
    with pytest.raises(
        TypeError, match="block_sparse_linear: x must be an ordinary dense tensor, got torch.sparse_coo"
    ):
        model(PLAIN.to_sparse())
