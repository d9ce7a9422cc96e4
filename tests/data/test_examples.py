import doctest
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparsenet.data import Evaluation, Examples, Normalization, evaluate, examples

X = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 0.0]])
Y = torch.tensor([0, 1, 1, 0])


def test_doctests():
    result = doctest.testmod(examples)
    assert result.attempted > 0 and result.failed == 0


def test_loss_and_accuracy_by_hand():
    """Logits 2, 0: -log p of the first class is log(1 + e^-2), of the second log(1 + e^2)."""
    found = evaluate(nn.Identity(), Examples(X, Y).batches(3))
    right, wrong = torch.tensor([-2.0, 2.0]).exp().log1p().tolist()
    assert found.loss == pytest.approx((2 * right + wrong + torch.tensor(2.0).log().item()) / 4)
    assert (found.accuracy, found.examples, found.percent) == (0.75, 4, 75.0)
    assert found.loss == pytest.approx(evaluate(nn.Identity(), [(X, Y)]).loss)


def test_percent_is_that_of_whole_numbers():
    for right, count in ((1, 3), (577, 1000), (8731, 10_000), (29, 297)):
        assert Evaluation(0.0, right / count, count).percent == 100.0 * right / count


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_judged_in_eval_mode_without_gradients(training):
    class Model(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    seen, model = [], Model().train(training)
    evaluate(model, [(X, Y)])
    assert seen == [(False, False)] and model.training is training and torch.is_grad_enabled()


def test_half_precision_is_judged_in_float32():
    logits = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    found = evaluate(nn.Identity(), [(logits, torch.tensor([1]))])
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits.float(), torch.tensor([1]))), abs=1e-7)


def test_no_example_is_refused():
    with pytest.raises(ValueError, match="evaluate: stream must have at least one example, got none"):
        evaluate(nn.Identity(), [])


def test_rows_of_examples():
    chosen = Examples(X, Y, torch.tensor([3, 1]))
    assert len(chosen) == 2 and len(Examples(X, Y)) == 4
    assert chosen.rows.tolist() == [3, 1] and Examples(X, Y).rows.tolist() == [0, 1, 2, 3]
    ((x, y),) = chosen.batches(8, Normalization(torch.tensor([1.0]), torch.tensor([2.0])))
    assert x.tolist() == [[-0.5, -0.5], [-0.5, 0.5]] and y.tolist() == [0, 1]


# --- what is taken ---


class Table:
    """Something that becomes an array, as a pandas frame does."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


def read_only(array):
    array.setflags(write=False)
    return array


PIXELS = np.arange(12, dtype=np.uint8).reshape(4, 3)
LABELS = np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (PIXELS, torch.uint8),
        (torch.from_numpy(PIXELS.copy()), torch.uint8),
        (read_only(PIXELS.astype(np.float64)), torch.float32),
        (PIXELS.astype(np.int64), torch.float32),
        (PIXELS.astype(">f4"), torch.float32),
        (PIXELS.astype(np.float16), torch.float32),
        (PIXELS.astype(np.longdouble), torch.float32),
        (torch.from_numpy(PIXELS.copy()).double().requires_grad_(), torch.float32),
        (torch.from_numpy(PIXELS.copy()).bfloat16(), torch.float32),
        (PIXELS[::-1][::-1], torch.uint8),
        (PIXELS.tolist(), torch.float32),
        (tuple(map(tuple, PIXELS.tolist())), torch.float32),
        (Table(PIXELS), torch.uint8),
    ],
)
@pytest.mark.filterwarnings("error")
def test_row83_examples_of_any_array(x, dtype):
    for given in ((x, LABELS), [x, LABELS], {"x": x, "label": LABELS}):
        found = examples.source_of(given)
        assert found.x.dtype == dtype and found.x.tolist() == PIXELS.tolist() and not found.x.requires_grad


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64", "bool"])
def test_row83_labels_of_any_integer_type(dtype):
    array = np.array([0, 1, 1, 0], dtype=dtype)
    for y in (array, torch.from_numpy(array), array.tolist(), array.astype(array.dtype.newbyteorder(">"))):
        for found in (Examples(PIXELS, y).y, examples.batch_of((PIXELS, y))[1]):
            assert found.dtype == torch.int64 and found.tolist() == [0, 1, 1, 0]


def test_row83_rows_of_any_integer_type():
    for rows in (np.array([2, 0], dtype=np.int16), [2, 0], torch.tensor([2, 0], dtype=torch.uint8)):
        assert Examples(PIXELS, LABELS, rows).rows.tolist() == [2, 0]
    for rows in ([4], [-1], [True, False, True, False], [0.0], [[0]]):
        with pytest.raises(ValueError, match=r"Examples: indices must be integers \[m\] in \[0, 4\)"):
            Examples(PIXELS, LABELS, rows)


@pytest.mark.parametrize(
    "batch",
    [(PIXELS, LABELS), [PIXELS, LABELS], *({x: PIXELS, y: LABELS} for x in examples.X_KEYS for y in examples.Y_KEYS)],
)
def test_row83_batches_of_any_form(batch):
    x, y = examples.batch_of(batch)
    assert torch.equal(x, torch.from_numpy(PIXELS)) and y.tolist() == LABELS.tolist()


ONES = torch.ones(4, 3)
BAD_X = [
    (ONES.to_sparse(), TypeError, "must be a dense tensor of real numbers, got a sparse one"),
    (ONES.to_sparse_csr, TypeError, "must be a dense tensor of real numbers, got a sparse one"),
    (lambda: torch.nested.nested_tensor([ONES[0], ONES[1]]), TypeError, "must be a dense tensor .* got a nested one"),
    (
        lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.quint8),
        TypeError,
        "must be a dense tensor .* got a quantized one",
    ),
    (ONES.cfloat(), TypeError, "must be a dense tensor of real numbers, got a complex one"),
    (ONES.to("meta"), TypeError, "must be a dense tensor of real numbers, got a meta one"),
    ([["a", "b"]] * 4, TypeError, "must be an array of numbers, got <U1"),
    ([[1, 2], [3]], TypeError, "must be an array of one shape, got a list"),
    (torch.ones(4), ValueError, r"must be \[.*features...\], got \[4\]"),
    (torch.tensor(1.0), ValueError, r"must be \[.*features...\], got \[\]"),
]
BAD_Y = [
    (torch.ones(4, 1).long(), ValueError, r"one class number per example, \[4\], got \[4, 1\]; y.squeeze\(1\) makes"),
    (
        torch.eye(4),
        ValueError,
        r"one class number per example, \[4\], got \[4, 4\]; y.argmax\(1\) makes it",
    ),
    (torch.ones(3).long(), ValueError, r"one class number per example, \[4\], got \[3\]$"),
    (torch.ones(4), TypeError, r"class numbers of an integer type \(only classifiers are trained\), got torch.float32"),
    (["a", "b", "c", "d"], TypeError, "must be an array of numbers, got <U1"),
    (torch.ones(4).long().to_sparse(), TypeError, "must be a dense tensor of real numbers, got a sparse one"),
]


@pytest.mark.filterwarnings("ignore")  # of torch's, about nested, quantized and sparse tensors
@pytest.mark.parametrize("taken", [lambda x, y: Examples(x, y), lambda x, y: examples.batch_of((x, y))])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [*((x, LABELS, *rest) for x, *rest in BAD_X), *((ONES, y, *rest) for y, *rest in BAD_Y)],
)
def test_row83_other_tensors_are_refused_in_a_sentence(taken, x, y, error, message):
    with pytest.raises(error, match=message) as caught:
        taken(x() if callable(x) else x, y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (ONES * math.nan, LABELS, "Examples: x must be finite in float32, got nan or inf"),
        (ONES.double() * 1e300, LABELS, "Examples: x must be finite in float32, got nan or inf"),
        (ONES, LABELS - 1, "Examples: y must be class numbers of 0 or more, got -1"),
        (ONES[:, :0], LABELS, r"Examples: x must be \[n, features...\], got \[4, 0\]"),
    ],
)
def test_row83_values_of_examples_in_memory(x, y, message):
    with pytest.raises(ValueError, match=message):
        Examples(x, y)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": ONES}, "x or input or inputs and y or label or labels or target, and nothing else, got x"),
        ({"x": ONES, "y": LABELS, "weight": ONES}, "and nothing else, got x, y, weight"),
        ({"x": ONES, "input": ONES, "y": LABELS}, "and nothing else, got x, input, y"),
        ({}, "and nothing else, got nothing"),
    ],
)
def test_row84_dictionaries_with_other_entries(batch, message):
    for taken in (examples.batch_of, examples.source_of):
        with pytest.raises(ValueError, match=f"Trainer: a dictionary must hold .*{message}"):
            taken(batch)


def test_row84_what_is_no_examples():
    for nothing in (3, None, "text", torch.ones(3, 4), TensorDataset(ONES, torch.zeros(4))):
        with pytest.raises(TypeError, match="examples must be .x, y., Examples or an iterable of batches, got"):
            examples.source_of(nothing)
    for batches_ in ([(ONES, LABELS)] * 2, ((ONES, LABELS), (ONES, LABELS)), ([ONES, LABELS], [ONES, LABELS])):
        assert examples.source_of(batches_) is batches_, "two batches are no pair"


def test_row84_lengths():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(ONES[0], 1)])

    assert examples.num_batches(Examples(PIXELS, LABELS), 3) == 2
    assert examples.num_batches([1, 2, 3], 3) == 3
    for stream in (iter([1, 2]), DataLoader(Stream()), (n for n in range(3))):
        with pytest.raises(TypeError, match="batches must have a length and be there again for every epoch"):
            examples.num_batches(stream, 3)


def test_row84_a_judged_model_is_in_its_mode_again_after_an_error():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), the model's outputs, got 2"):
        evaluate(model, [(ONES, torch.from_numpy(LABELS))])
    assert model.training
