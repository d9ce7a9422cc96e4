import doctest

import pytest
import torch

from sparsenet.functional import threads
from sparsenet.functional.build import build_info
from sparsenet.functional.threads import torch_threads


def test_doctests():
    result = doctest.testmod(threads)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(("count", "inside"), [(2, 2), (1, 1), (0, 3)])
def test_threads_within_the_block(count, inside):
    torch.set_num_threads(3)
    with torch_threads(count):
        assert torch.get_num_threads() == build_info()["threads"] == inside
    assert torch.get_num_threads() == 3


def test_threads_after_a_failure():
    torch.set_num_threads(3)
    with pytest.raises(RuntimeError, match="stopped"), torch_threads(1):
        raise RuntimeError("stopped")
    assert torch.get_num_threads() == 3
