"""The problems of ``sparsenet reproduce growth``: shapes, scales, and no example in two parts of a split."""

from __future__ import annotations

import pytest
import torch

from sparsenet.data import Dataset
from sparsenet.reproduce import growth_tasks
from sparsenet.reproduce.growth_tasks import TABLES, Task, image_task, table_task

SHAPES = {  # features, classes, examples
    "wine": (13, 3, 178),
    "breast cancer": (30, 2, 569),
    "diabetes": (10, 0, 442),
    "Friedman-1": (10, 0, 2000),
    "two spirals": (2, 2, 2000),
    "parity": (10, 2, 4000),
    "Mackey-Glass": (4, 0, 3194),
    "permuted digits": (64, 10, 1797),
    "characters": (216, 27, 12_000),
}


def numbered(n: int, features: tuple[int, ...] = (3,)) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples that can be told apart after standardising: an increasing number in every feature."""
    x = torch.arange(n).float().reshape(n, *[1] * len(features)).expand(n, *features)
    return x.clone(), torch.arange(n) % 2


def test_the_list_of_shapes_is_complete():
    assert set(SHAPES) == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_their_shapes_and_are_standardised_by_their_training_examples(name):
    features, classes, examples = SHAPES[name]
    task = table_task(name)
    assert (task.features, task.classes, task.outputs) == (features, classes, classes or 1)
    parts = task.train, task.validation, task.test
    assert sum(len(x) for x, _ in parts) == examples
    assert abs(len(task.test[0]) - examples / 4) <= 1
    assert abs(len(task.validation[0]) - examples * 3 / 20) <= 1
    for x, y in parts:
        assert x.shape == (len(x), features) and x.dtype == torch.float32 and bool(x.isfinite().all())
        assert y.shape == ((len(x),) if classes else (len(x), 1))
        assert y.dtype == (torch.int64 if classes else torch.float32)
        assert not classes or 0 <= int(y.min()) <= int(y.max()) < classes
    x, y = task.train
    spread = x.std(0)
    assert float(x.mean(0).abs().max()) < 1e-3
    assert bool(((spread - 1).abs() < 1e-3).logical_or(spread == 0).all())  # constant columns stay
    if not classes:
        assert abs(float(y.mean())) < 1e-4 and abs(float(y.std()) - 1) < 1e-4


@pytest.mark.parametrize("name", TABLES)
def test_a_task_is_the_same_every_time_and_leaves_torchs_generator_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = table_task(name), table_task(name)
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("train", "validation", "test"):
        for a, b in zip(getattr(first, part), getattr(second, part), strict=True):
            assert torch.equal(a, b)


def test_no_example_is_in_two_parts():
    task = growth_tasks._task("made", 2, *numbered(200))
    parts = [set(x[:, 0].tolist()) for x, _ in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [120, 30, 50]
    assert len(set.union(*parts)) == 200


def test_test_examples_do_not_count_in_mean_and_deviation():
    x, y = numbered(100)
    far = (x + 1e6, y)
    task = growth_tasks._task("made", 2, x, y, test=far)
    assert abs(float(task.train[0].mean())) < 1e-5
    assert float(task.test[0].min()) > 1e3


def images(shape: tuple[int, ...], n: int = 400, m: int = 100) -> Dataset:
    x = torch.randint(256, (n + m, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Dataset("made", x[:n], torch.arange(n) % 4, x[n:], torch.arange(m) % 4, 4, "here")


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
@pytest.mark.parametrize("flat", [True, False])
def test_images_as_vectors_and_as_maps(shape, flat):
    task = image_task(images(shape), flat=flat)
    expected = (torch.Size(shape).numel(),) if flat else (shape[0] if len(shape) == 3 else 1, 6, 5)
    sizes = (360, 40, 100) if flat else (320, 80, 100)
    for (x, y), size in zip((task.train, task.validation, task.test), sizes, strict=True):
        assert x.shape == (size, *expected) and y.shape == (size,)
    assert task.outputs == 4
    assert abs(float(task.train[0].mean())) < 0.05 and abs(float(task.train[0].std()) - 1) < 0.05
    rows = [tuple(row.flatten().tolist()) for part in (task.train, task.validation) for row in part[0]]
    assert len(set(rows)) == 400  # random pictures differ: none is in both


def test_a_share_of_the_images():
    task = image_task(images((4, 4), 2000, 1000), scale=0.25)
    assert [len(x) for x, _ in (task.train, task.validation, task.test)] == [450, 50, 250]


def test_scores_by_hand():
    classes = Task("made", 2, *[(torch.zeros(1, 1), torch.zeros(1))] * 3)
    assert (
        classes.score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 1, 0])) == 75
    )
    numbers = Task("made", 0, *[(torch.zeros(1, 1), torch.zeros(1, 1))] * 3)
    target = torch.tensor([[-1.0], [1.0]])
    assert numbers.score(target, target) == 100
    assert numbers.score(torch.zeros(2, 1), target) == 0
    assert float(numbers.loss(torch.zeros(2, 1), target)) == 1


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="table_task: name must be one of wine, .* got 'iris'"):
        table_task("iris")
