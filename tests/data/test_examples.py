import doctest

import pytest
import torch
from torch import nn

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
