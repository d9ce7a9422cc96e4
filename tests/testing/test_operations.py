"""The oracle itself: tolerances by hand, and checks that notice a kernel which computes wrongly."""

import pytest
import torch

from sparsenet import functional, testing
from sparsenet.testing import LinearCase, linear_cases, self_test, tolerance

CASE = LinearCase((48, 64), 16, torch.float32, batch=5, kind="half", activation="none", bias=True)
CHECKS = {
    "block_sparse_linear": testing.check_linear,
    "block_gradient_squared_norms": testing.check_norms,
    "candidate_gradients": testing.check_candidates,
}


def test_unit_roundoff_is_half_the_distance_to_the_next_number():
    assert testing.unit_roundoff(torch.float32) == 2**-24 and testing.unit_roundoff(torch.bfloat16) == 2**-8


def test_tolerance_grows_with_length_and_magnitude_and_with_the_dtype():
    """At least one rounding of the result, at most ``terms`` roundings of the magnitude beside it."""
    one = torch.ones(1, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u = testing.unit_roundoff(dtype)
        for terms in (1, 16, 4096):
            allowed = tolerance(dtype, terms, 10 * one, one).item()
            assert u <= allowed <= 1.5 * (u + (terms + 2) * 10 * 2**-24) + 1e-6, (dtype, terms)
    long, short = (tolerance(torch.float32, n, one, one).item() for n in (10_000, 100))
    assert 5 < long / short <= 10.5, "the square root of the length"
    assert tolerance(torch.float64, 100, one, one).item() < 1e-13


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_notices_one_wrong_element(name, monkeypatch):
    CHECKS[name](CASE)
    right = getattr(functional, name)

    def slightly_wrong(*arguments, **options):
        result = right(*arguments, **options)
        return result + torch.zeros_like(result).index_fill_(0, torch.tensor([0]), 1e-3) * result.detach().abs().max()

    monkeypatch.setattr(functional, name, slightly_wrong)
    with pytest.raises(AssertionError, match=r"element \d+ is .*, expected .* \+- "):
        CHECKS[name](CASE)


def test_cases_cover_every_block_size_dtype_and_shape_and_all_kinds_of_pattern():
    cases = list(linear_cases())
    combinations = {(case.block_size, case.dtype, case.shape) for case in cases}
    assert len(combinations) == len(cases) == len(functional.BLOCK_SIZES) * len(testing.DTYPES) * len(testing.SHAPES)
    assert {case.kind for case in cases} == set(testing.PATTERN_KINDS)
    assert {case.activation for case in cases} == set(functional.ACTIVATIONS)


def test_self_test_counts_its_cases_and_raises_where_a_kernel_is_wrong(monkeypatch):
    arguments = ([16], [torch.float32], [(48, 64), (5, 70)])
    threads = torch.get_num_threads()
    assert self_test(*arguments) == 2
    assert torch.get_num_threads() == threads
    right = functional.block_gradient_squared_norms
    monkeypatch.setattr(functional, "block_gradient_squared_norms", lambda *a: right(*a) * 1.001)
    with pytest.raises(AssertionError, match="norms"):
        self_test(*arguments)
    assert torch.get_num_threads() == threads
