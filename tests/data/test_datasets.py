"""Readers against files written here byte by byte, loading without and with a (simulated) network, batches, splits."""

import dataclasses
import gzip
import hashlib
import http.client
import importlib.util
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import types
import urllib.error
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsenet.data import datasets as data
from sparsenet.data import readers
from sparsenet.data.datasets import Dataset, Normalization, batches, load, split
from sparsenet.data.readers import read_cifar, read_csv, read_idx, read_npz, validate_labels

IDX_CODES = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def refuses(error, *parts):
    """The error, with these parts of its message in this order."""
    return pytest.raises(error, match=".*".join(re.escape(str(part)) for part in parts))


def idx_bytes(array, dtype="u1"):
    array = np.asarray(array)
    header = bytes([0, 0, IDX_CODES[dtype], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(dtype).tobytes()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_idx_folder(folder, n_train=20, n_test=6, suffix="", pack=lambda content: content):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        images, labels = rng.integers(0, 256, (n, 4, 3)), np.arange(n) % 10
        write(folder / f"{prefix}-images-idx3-ubyte{suffix}", pack(idx_bytes(images)))
        write(folder / f"{prefix}-labels-idx1-ubyte{suffix}", pack(idx_bytes(labels)))
    return folder


def cifar_record(label, value, coarse=None):
    return bytes([label] if coarse is None else [coarse, label]) + bytes([value]) * 3072


def write_cifar_folder(folder, classes=10, n=3):
    for i, name in enumerate(data._CIFAR_FILES[classes]):
        coarse = None if classes == 10 else 7
        write(folder / name, b"".join(cifar_record(k, 10 * i + k, coarse) for k in range(n)))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty machine: no local data, no cache, no packages, no network, no scikit-learn."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSENET_DATA", raising=False)
    monkeypatch.setattr(data, "_PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find_spec(name, *a)
    )
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    return tmp_path


@pytest.fixture
def scikit(home, monkeypatch):
    """A stand-in for scikit-learn with 100 tiny digits."""
    bundled = types.ModuleType("sklearn.datasets")
    images = np.arange(100 * 64).reshape(100, 8, 8) % 17
    bundled.load_digits = lambda: types.SimpleNamespace(images=images.astype(float), target=np.arange(100) % 10)
    package = types.ModuleType("sklearn")
    package.datasets = bundled
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", bundled)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "sklearn" or find_spec(name, *a))
    return bundled


# IDX ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", IDX_CODES)
@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress])
def test_idx_every_type_packed_or_not(tmp_path, dtype, pack):
    values = np.array([[1, 2, 3], [100, 127, 0]])
    tensor = read_idx(write(tmp_path / "any-name", pack(idx_bytes(values, dtype))))
    assert tensor.dtype == torch.from_numpy(np.zeros(1, np.dtype(dtype).newbyteorder("="))).dtype
    assert tensor.tolist() == values.tolist()


def test_idx_negative_and_fractional_values_are_big_endian(tmp_path):
    path = write(tmp_path / "a", bytes.fromhex("00000b01 00000002 fffe0100"))
    assert read_idx(path).tolist() == [-2, 256]
    assert read_idx(write(tmp_path / "b", idx_bytes([0.5, -3.25], ">f4"))).tolist() == [0.5, -3.25]


def test_idx_of_no_examples(tmp_path):
    assert read_idx(write(tmp_path / "a", idx_bytes(np.zeros((0, 28, 28))))).shape == (0, 28, 28)


GOOD = idx_bytes(np.arange(6).reshape(2, 3))
HUGE = bytes([0, 0, 14, 3]) + b"\xff" * 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin with the IDX magic 00 00 <type> <rank>, got []"),
        (b"\x89PNG\r\n", "must begin with the IDX magic 00 00 <type> <rank>, got [89 50 4e 47]"),
        (b"\0\0\x0a\x01" + GOOD, "got [00 00 0a 01]"),  # no such type
        (b"\0\0\x08\x00" + GOOD, "got [00 00 08 00]"),  # no sizes
        (b"\0\0\x08\xff" + GOOD, "got [00 00 08 ff]"),  # 255 sizes
        (GOOD[:9], "must have a header of 12 bytes, got 9"),
        (GOOD[:-1], "must hold 6 bytes for [2, 3], got 5"),
        (GOOD + b"\0", "must hold 6 bytes for [2, 3], got more"),
        (HUGE, "for [4294967295, 4294967295, 4294967295], got at most 16"),
        (gzip.compress(GOOD[:-1], mtime=0), "must hold 6 bytes for [2, 3], got 5"),
        (gzip.compress(GOOD + b"\0", mtime=0), "must hold 6 bytes for [2, 3], got more"),
        (gzip.compress(HUGE, mtime=0), "for [4294967295, 4294967295, 4294967295], got at most"),
        (gzip.compress(GOOD, mtime=0)[:-9], "must be a whole gzip file, got: "),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 12, "must be a whole gzip file, got: "),  # no deflate
        (gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), "must be a whole gzip file, got: CRC"),
        (b"\x1f\x8b\x07" + bytes(20), "must be a whole gzip file, got: "),
    ],
)
def test_idx_errors_name_the_file(tmp_path, content, message):
    path = write(tmp_path / "t10k-images-idx3-ubyte", content)
    with refuses(ValueError, f"read_idx: {path} ", message):
        read_idx(path)


def test_idx_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")


# CIFAR --------------------------------------------------------------------------------------------------------------


def test_cifar10_layout(tmp_path):
    pixels = np.arange(3072) % 251
    x, y = read_cifar(write(tmp_path / "a.bin", bytes([9]) + bytes(pixels.tolist()) + cifar_record(3, 200)))
    assert x.dtype == torch.uint8 and x.shape == (2, 3, 32, 32) and y.tolist() == [9, 3]
    assert x[0, 1, 2, 3] == pixels[1024 + 2 * 32 + 3]  # channel 1, row 2, column 3
    assert (x[1] == 200).all()


def test_cifar100_returns_the_fine_label(tmp_path):
    x, y = read_cifar(write(tmp_path / "a.bin", cifar_record(99, 5, coarse=19) + cifar_record(0, 6, coarse=1)), 100)
    assert y.tolist() == [99, 0] and (x[0] == 5).all() and (x[1] == 6).all()


def test_cifar_errors_name_the_file(tmp_path):
    path = write(tmp_path / "data_batch_1.bin", cifar_record(3, 0)[:-1])
    with refuses(ValueError, f"read_cifar: {path} must be records of 3073 bytes, got 3072 bytes"):
        read_cifar(path)
    with refuses(ValueError, f"read_cifar: {path} must be records of 3074 bytes, got 3072 bytes"):
        read_cifar(path, 100)
    with refuses(ValueError, f"read_cifar: {path} must be records of 3073 bytes, got 0 bytes"):
        read_cifar(write(path, b""))
    with refuses(ValueError, f"validate_labels: {path} must be in [0, 10), got 10"):
        read_cifar(write(path, cifar_record(10, 0)))
    with refuses(ValueError, "read_cifar: num_classes must be 10 or 100, got 20"):
        read_cifar(path, 20)


def test_pickled_cifar_is_not_unpickled(tmp_path):
    path = write(tmp_path / "data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}))
    with pytest.raises(ValueError, match="must be records of 3073 bytes"):
        read_cifar(path)


# csv ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label_column", "x", "y"),
    [
        ("1.5,2,0\n3,4.25,1\n", None, [[1.5, 2], [3, 4.25]], [0, 1]),  # the last column
        ("1.5,2,0\n3,4.25,1", 2, [[1.5, 2], [3, 4.25]], [0, 1]),
        ("0,1.5,2\r\n1,3,-4e-1\r\n", 0, [[1.5, 2], [3, -0.4]], [0, 1]),
        ("label,pixel0,pixel1\n5,0,255\n7,1,2\n", None, [[0, 255], [1, 2]], [5, 7]),  # the named column
        ("\ufeffa,Class,b\n1,0,2\n3,1,4\n", None, [[1, 2], [3, 4]], [0, 1]),
        ('"a","b","target"\n"1","2","0"\n', None, [[1, 2]], [0]),
        ("a,b,c\n1,2,0\n", None, [[1, 2]], [0]),
        ("a,b,label\n1,2,0\n", 0, [[2, 0]], [1]),  # the argument wins
        ("label,0,1\n3,8,9\n", None, [[8, 9]], [3]),  # a name among numbers: still a header
    ],
)
def test_csv(tmp_path, text, label_column, x, y):
    features, labels = read_csv(write(tmp_path / "a.csv", text.encode()), label_column)
    assert features.dtype == torch.float32 and labels.dtype == torch.int64
    assert features.numpy() == pytest.approx(np.array(x)) and labels.tolist() == y


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{} must have a row, two columns and column -1, got [0, "),
        (b"a,b,label\n", "{} must have a row, two columns and column 2, got [0, "),
        (b"1\n2\n", "{} must have a row, two columns and column -1, got [2, 1]"),
        (b"1,2,0\n1,2\n", "{} must be rows of numbers of one length, got: "),
        (b"1,2,0\nx,2,1\n", "{} must be rows of numbers of one length, got: could not convert string 'x'"),
        (b"x,2,0\n1,2,1\n", "{} must be rows of numbers of one length, got: could not convert string 'x'"),
        (b"1,,0\n", "{} must be rows of numbers of one length, got: "),
        (b"\xff\xfe\x00,1\n", "{} must be rows of numbers of one length, got: "),
        (b"1,nan,0\n", "{} must be finite in float32, got nan or inf"),
        (b"1,1e39,0\n", "{} must be finite in float32, got nan or inf"),
        (b"1,2,0.5\n", "labels of {} must be whole numbers in [0, 2147483648), got 0.5"),
        (b"1,2,-1\n", "labels of {} must be whole numbers in [0, 2147483648), got -1"),
        (b"1,2,nan\n", "labels of {} must be whole numbers in [0, 2147483648), got nan"),
    ],
)
def test_csv_errors_name_the_file(tmp_path, content, message):
    path = write(tmp_path / "a.csv", content)
    with refuses(ValueError, "read_csv: " + message.format(path)):
        read_csv(path)


def test_csv_label_column_out_of_range(tmp_path):
    path = write(tmp_path / "a.csv", b"1,2,0\n")
    with refuses(ValueError, f"{path} must have a row, two columns and column 3, got [1, 3]"):
        read_csv(path, 3)


# npz ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", readers._NPZ_KEYS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, keys, save):
    x, y = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.array([[2], [0], [1]], np.uint16)
    path = tmp_path / "a.npz"
    save(path, other=np.array("text"), **{key: (x, y)[i % 2] for i, key in enumerate(keys)})
    arrays = read_npz(path)
    assert len(arrays) == len(keys)
    assert arrays[-2].dtype == torch.uint8 and arrays[-2].tolist() == x.tolist()
    assert arrays[-1].dtype == torch.int64 and arrays[-1].tolist() == [2, 0, 1]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int16, ">f4", bool])
def test_npz_other_numbers_become_float32(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", x=np.array([[0, 1], [1, 1]], dtype), y=np.array([0.0, 1.0]))
    x, y = read_npz(tmp_path / "a.npz")
    assert x.dtype == torch.float32 and x.tolist() == [[0, 1], [1, 1]] and y.tolist() == [0, 1]


class Explosive:
    """Unpickling this would write a file."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


ONE = np.ones((1, 1))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (np.ones((2, 2)), [0, 1, 1], ValueError, "read_npz: y of {} must hold 2 labels, one per example, got 3"),
        ([["a"]], [0], TypeError, "read_npz: x of {} must be an array of numbers, got <U1"),
        (ONE * 1j, [0], TypeError, "read_npz: x of {} must be an array of numbers, got complex128"),
        ([[np.inf]], [0], ValueError, "read_npz: x of {} must be finite in float32, got nan or inf"),
        ([[1e300]], [0], ValueError, "read_npz: x of {} must be finite in float32, got nan or inf"),
        (ONE, [np.nan], ValueError, "read_npz: y of {} must be whole numbers in [0, 2147483648), got nan"),
        (ONE, np.uint64([2**63]), ValueError, "read_npz: y of {} must be whole numbers in [0, 2147483648), got 922"),
        (ONE, np.eye(2), TypeError, "read_npz: y of {} must be one whole number per example, got float64 [2, 2]"),
        (ONE, 3, TypeError, "read_npz: y of {} must be one whole number per example, got int64 []"),
        (ONE, ["a"], TypeError, "read_npz: y of {} must be one whole number per example, got <U1 [1]"),
        ([[Explosive()]], [0], ValueError, "read_npz: {} must be a zip of plain arrays, got: Object arrays cannot be"),
    ],
)
def test_npz_errors_name_the_file(tmp_path, monkeypatch, x, y, error, message):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=x, y=y)
    with warnings.catch_warnings(), refuses(error, message.format("a.npz")):
        warnings.simplefilter("error")
        read_npz("a.npz")
    assert not Path("unpickled").exists()


def test_npz_without_the_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=ONE)
    with refuses(ValueError, f"{tmp_path}/a.npz must hold arrays x_train, y_train, x_test, y_test, or x, y, got ['x']"):
        read_npz(tmp_path / "a.npz")


def test_npz_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npy, absurd = io.BytesIO(), io.BytesIO()
    np.save(npy, ONE)
    with zipfile.ZipFile(absurd, "w") as archive:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,)}"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        archive.writestr("y.npy", b"")
    half = npz_bytes()[:200]
    for content in (b"", b"PK\x03\x04", pickle.dumps(Explosive()), npy.getvalue(), absurd.getvalue(), half):
        path = write(tmp_path / "a.npz", content)
        with refuses(ValueError, f"read_npz: {path} must be a zip of plain arrays, got: "):
            read_npz(path)
    assert not Path("unpickled").exists()


# any bytes at all --------------------------------------------------------------------------------------------------


def npz_bytes():
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.arange(6.0).reshape(3, 2), y=np.arange(3))
    return stream.getvalue()


SEEDS = {
    read_idx: [GOOD, gzip.compress(GOOD, mtime=0), HUGE],
    read_cifar: [cifar_record(3, 7)],
    read_csv: [b"a,b,label\n1,2,0\n3.5,-4,1\n"],
    read_npz: [npz_bytes()],
}


@pytest.mark.parametrize("reader", SEEDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.data())
def test_hostile_bytes_are_an_error_that_names_the_file_or_arrays(tmp_path, reader, source):
    content = bytearray(source.draw(st.sampled_from(SEEDS[reader])))
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in source.draw(st.lists(places, max_size=6)):
        content[place] = value
    content = content[: source.draw(st.integers(0, len(content)))] + source.draw(st.binary(max_size=8))
    path = write(tmp_path / "hostile", bytes(content))
    try:
        reader(path)
    except (ValueError, TypeError) as error:
        assert str(path) in str(error)


# load ---------------------------------------------------------------------------------------------------------------


def test_load_prefers_sparsenet_data_then_cache_then_package(home, monkeypatch):
    monkeypatch.setenv("SPARSENET_DATA", str(home / "mine"))
    for folder, n in ((home / "packaged", 7), (home / "cache/sparsenet", 8), (home / "mine", 9)):
        write_idx_folder(folder / "fashion-mnist", n_train=n, suffix=".gz", pack=gzip.compress)
        loaded = load("fashion-mnist")
        assert len(loaded.train_x) == n and loaded.source == str(folder / "fashion-mnist")
    assert (loaded.name, loaded.num_classes, loaded.num_features) == ("fashion-mnist", 10, 12)
    assert loaded.train_x.dtype == torch.uint8 and loaded.train_y.dtype == torch.int64
    assert load("Fashion_MNIST").source == loaded.source


def test_load_passes_over_incomplete_folders(home, monkeypatch):
    monkeypatch.setenv("SPARSENET_DATA", str(home / "mine"))
    write_idx_folder(home / "mine/mnist")
    (home / "mine/mnist/t10k-labels-idx1-ubyte").unlink()
    write_idx_folder(home / "cache/sparsenet/mnist", n_train=5)
    assert len(load("mnist").train_x) == 5


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("flat", [False, True])
def test_load_cifar_binary_files(home, monkeypatch, classes, flat):
    monkeypatch.setenv("SPARSENET_DATA", str(home))
    folder = write_cifar_folder(home / f"cifar{classes}", classes)
    if flat:
        for file in list(folder.glob("*/*")):
            file.rename(folder / file.name)
    loaded = load(f"cifar{classes}")
    trained = 15 if classes == 10 else 3
    assert loaded.train_x.shape == (trained, 3, 32, 32) and loaded.test_x.shape == (3, 3, 32, 32)
    assert loaded.num_classes == classes and loaded.num_features == 3072
    assert loaded.train_y.tolist() == [0, 1, 2] * (trained // 3)
    assert loaded.test_x[0, 0, 0, 0] == (50 if classes == 10 else 10)  # from the last file


def test_load_a_folder_a_npz_and_a_csv(home):
    assert len(load(write_idx_folder(home / "idx")).test_x) == 6
    rows = "".join(f"{i},{i % 7},{i % 3}\n" for i in range(30))
    write(home / "both/train.csv", rows.encode())
    write(home / "both/test.csv", b"1,2,0\n")
    loaded = load(home / "both")
    assert (len(loaded.train_x), len(loaded.test_x), loaded.num_classes, loaded.name) == (30, 1, 3, "both")
    np.savez(home / "a.npz", x_train=np.ones((4, 2)), y_train=[0, 1, 0, 1], x_test=np.ones((1, 2)), y_test=[1])
    assert load(str(home / "a.npz")).num_classes == 2
    (home / "single").mkdir()
    (home / "a.npz").rename(home / "single/a.npz")
    assert load(home / "single").train_x.shape == (4, 2)


def test_load_holds_out_the_same_stratified_fifth(home):
    path = write(home / "a.csv", "".join(f"{i},{i % 7},{i % 3}\n" for i in range(30)).encode())
    first, second = load(path), load(path)
    assert (len(first.train_x), len(first.test_x)) == (24, 6)
    assert first.test_y.bincount().tolist() == [2, 2, 2]
    assert torch.equal(first.test_x, second.test_x)
    assert sorted(first.train_x[:, 0].tolist() + first.test_x[:, 0].tolist()) == list(range(30))


def test_load_errors(home, monkeypatch):
    with refuses(
        FileNotFoundError, "load: name_or_path must be one of fashion-mnist, ", "or an existing path, got 'a-name'"
    ):
        load("a-name")
    kinds = "must be a .npz or .csv file or a folder of IDX, CIFAR, csv or npz files"
    with refuses(ValueError, f"load: {home}/a.txt {kinds}"):
        load(write(home / "a.txt", b"1,2,0\n"))
    with refuses(ValueError, f"load: {home} {kinds}"):
        load(home)
    with refuses(ValueError, f"validate_labels: labels of {home}/one.csv must have 2 classes or more, got 1"):
        load(write(home / "one.csv", b"1,2,1\n3,4,1\n"))
    with refuses(ValueError, f"load: labels of {home}/far.csv must be below the number of examples, got 70000"):
        load(write(home / "far.csv", b"1,1\n4,70000\n5,1\n7,1\n1,70000\n1,70000"))
    monkeypatch.setenv("SPARSENET_DATA", str(home))
    labels = write_idx_folder(home / "mnist") / "train-labels-idx1-ubyte"
    write(labels, idx_bytes(np.zeros(19)))
    with refuses(ValueError, f"load: {labels} must hold 20 labels, one per example, got 19"):
        load("mnist")
    write(labels, idx_bytes(np.full(20, 10)))
    with refuses(ValueError, f"validate_labels: train_y of {home}/mnist must be in [0, 10), got 10"):
        load("mnist")


def test_load_falls_back_to_digits_with_one_notice(scikit, home):
    with pytest.warns(UserWarning) as notices:
        loaded = load("fashion-mnist")
    assert [str(notice.message) for notice in notices] == [
        f"load: fashion-mnist is in none of {home}/cache/sparsenet/fashion-mnist, {home}/packaged/fashion-mnist and "
        "downloading https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/ failed "
        "(<urlopen error no network>); using scikit-learn's bundled digits instead"
    ]
    assert notices[0].filename == __file__
    assert loaded.name == "digits" and loaded.source == "scikit-learn's bundled digits"
    assert loaded.train_x.dtype == torch.uint8 and loaded.train_x.shape == (80, 8, 8)
    assert loaded.test_y.bincount().tolist() == [2] * 10
    assert load("digits").train_x.equal(loaded.train_x)


def test_load_without_download_or_fallback_says_where_it_looked(home, scikit, monkeypatch):
    with refuses(FileNotFoundError, f"load: mnist is in none of {home}/cache/sparsenet/mnist, ", "and downloading"):
        load("mnist", fallback=False)
    with refuses(FileNotFoundError, "load: mnist is in none of", " and download=False"):
        load("mnist", download=False, fallback=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(FileNotFoundError, " and download=False; scikit-learn is not installed either"):
        load("mnist", download=False)


def test_digits_without_scikit_learn(home):
    with pytest.raises(ModuleNotFoundError, match="load: digits needs scikit-learn: pip install scikit-learn"):
        load("digits")


def test_real_digits():
    pytest.importorskip("sklearn")
    digits = load("digits")
    assert len(digits.train_x) + len(digits.test_x) == 1797 and digits.train_x.max() == 16 and digits.num_classes == 10


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSENET_DATA", raising=False)
    fashion = load()
    assert fashion.source == str(DEBIAN)
    assert fashion.train_x.shape == (60000, 28, 28) and fashion.test_x.shape == (10000, 28, 28)
    assert fashion.train_y.bincount().tolist() == [6000] * 10
    statistics = Normalization.from_data(fashion.train_x)
    assert statistics.mean.item() / 255 == pytest.approx(0.2860, abs=5e-5)  # the published figures
    assert statistics.std.item() / 255 == pytest.approx(0.3530, abs=5e-5)


# download -----------------------------------------------------------------------------------------------------------


class Server:
    """Stands in for urlopen: serves bytes by file name; what it lacks is a 404."""

    def __init__(self, monkeypatch, name, files):
        self.files, self.asked = dict(files), []
        monkeypatch.setattr(urllib.request, "urlopen", self)
        rows = [f"{name} {file} {len(c)} {hashlib.sha256(c).hexdigest()}" for file, c in files.items()]
        monkeypatch.setattr(data, "_MANIFEST", "\n" + "\n".join(rows) + "\n")

    def __call__(self, request, timeout):
        assert timeout > 0 and request.full_url.startswith("https://")
        self.asked.append(request.full_url)
        content = self.files.get(request.full_url.rsplit("/", 1)[1])
        if content is None:
            raise urllib.error.HTTPError(request.full_url, 404, "Not Found", {}, None)
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)


def packed_idx(folder):
    write_idx_folder(folder, suffix=".gz", pack=lambda content: gzip.compress(content, mtime=0))
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_download_is_checked_and_cached(home, monkeypatch):
    server = Server(monkeypatch, "mnist", packed_idx(home / "published"))
    loaded = load("mnist")
    cache = home / "cache/sparsenet/mnist"
    assert loaded.source == f"{cache}, downloaded" and len(loaded.train_x) == 20
    assert sorted(file.name for file in cache.iterdir()) == sorted(server.files)
    assert len(server.asked) == 4
    assert load("mnist").source == str(cache) and len(server.asked) == 4  # not asked again


def test_download_resumes_with_the_missing_files(home, monkeypatch):
    server = Server(monkeypatch, "mnist", packed_idx(home / "published"))
    last = server.files.pop("train-labels-idx1-ubyte.gz")
    with pytest.raises(FileNotFoundError, match=r"downloading https://.* failed \(HTTP Error 404: Not Found\)"):
        load("mnist", fallback=False)
    server.files["train-labels-idx1-ubyte.gz"] = last
    asked = len(server.asked)
    assert len(load("mnist").train_x) == 20
    assert len(server.asked) == asked + 1


@pytest.mark.parametrize("spoil", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"\0" + c[1:], lambda c: c * 50])
def test_spoiled_download_is_refused_and_leaves_nothing(home, monkeypatch, spoil):
    server = Server(monkeypatch, "mnist", packed_idx(home / "published"))
    for file, content in server.files.items():
        server.files[file] = spoil(content[:3000])
    with refuses(FileNotFoundError, "-ubyte.gz must be ", " bytes, sha256 ", ", got ", " bytes, sha256 "):
        load("mnist", fallback=False)
    assert list((home / "cache/sparsenet/mnist").iterdir()) == []


def test_endless_download_is_cut_at_the_published_size(home, monkeypatch):
    class Endless:
        sent = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            self.sent += size
            assert self.sent < 2**24, "still reading"
            return bytes(size)

    Server(monkeypatch, "mnist", packed_idx(home / "published"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Endless())
    with refuses(FileNotFoundError, "-ubyte.gz must be ", " bytes, sha256 ", ", got ", " bytes, sha256 "):
        load("mnist", fallback=False)


@pytest.mark.parametrize(
    "failure",
    [
        TimeoutError("timed out"),
        urllib.error.URLError(OSError("Name or service not known")),
        http.client.IncompleteRead(b"", 5),
        ConnectionResetError("reset by peer"),
    ],
)
def test_every_network_failure_is_one_clear_line(home, monkeypatch, failure):
    server = Server(monkeypatch, "mnist", packed_idx(home / "published"))
    server.files = dict.fromkeys(server.files, failure)
    with pytest.raises(FileNotFoundError) as raised:
        load("mnist")
    assert str(failure) in str(raised.value) and "\n" not in str(raised.value)


def test_connection_lost_half_way_leaves_nothing(home, monkeypatch):
    class Lost(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise ConnectionResetError("lost half-way")
            return super().read(5)

    server = Server(monkeypatch, "mnist", packed_idx(home / "published"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Lost(next(iter(server.files.values()))))
    with pytest.raises(FileNotFoundError, match="lost half-way"):
        load("mnist", fallback=False)
    assert list((home / "cache/sparsenet/mnist").iterdir()) == []


def test_cache_that_cannot_be_made(home, monkeypatch):
    write(home / "cache", b"a file where the folder should be")
    Server(monkeypatch, "mnist", packed_idx(home / "published"))
    with refuses(FileNotFoundError, "downloading", "failed", "cache"):
        load("mnist", fallback=False)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_archive_is_unpacked_by_name_only(home, monkeypatch, classes):
    source = write_cifar_folder(home / "published", classes)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in data._CIFAR_FILES[classes]:
            archive.add(source / name, name)
        evil = tarfile.TarInfo("../../evil")
        evil.size = 4
        archive.addfile(evil, io.BytesIO(b"evil"))
    name = f"cifar{classes}"
    Server(monkeypatch, name, {f"cifar-{classes}-binary.tar.gz": packed.getvalue()})
    assert load(name).num_classes == classes
    files = {Path(file).name for file in data._CIFAR_FILES[classes]}
    assert {file.name for file in (home / f"cache/sparsenet/{name}").iterdir()} == files  # no archive, no evil
    assert not list(home.rglob("evil"))


def test_archive_left_by_a_killed_run_is_unpacked(home, monkeypatch):
    source = write_cifar_folder(home / "published", 100)
    target = home / "cache/sparsenet/cifar100/cifar-100-binary.tar.gz"
    target.parent.mkdir(parents=True)
    with tarfile.open(target, mode="w:gz") as archive:
        for name in data._CIFAR_FILES[100]:
            archive.add(source / name, name)
    assert len(load("cifar100").train_x) == 3


def test_manifest_is_well_formed():
    rows = [row.split() for row in data._MANIFEST.strip().split("\n")]
    assert {row[0] for row in rows} == set(data._URLS) == set(data._NUM_CLASSES)
    assert all(len(row) == 4 and int(row[2]) > 0 and re.fullmatch("[0-9a-f]{64}", row[3]) for row in rows)
    assert all(url.startswith("https://") and url.endswith("/") for url in data._URLS.values())


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_manifest_against_debians_fashion_mnist():
    """Debian strips name and date from the gzip headers; put back, the sha256 is the published one."""
    for row in data._MANIFEST.strip().split("\n"):
        name, file, size, sha256 = row.split()
        if name == "fashion-mnist":
            content = (DEBIAN / file).read_bytes()
            date = 1504176606 if file.startswith("train") else 1504176627  # 2017-08-31, within the same minute
            header = b"\x1f\x8b\x08\x08" + date.to_bytes(4, "little") + content[8:10] + file[:-3].encode() + b"\0"
            assert len(header) + len(content) - 10 == int(size)
            assert hashlib.sha256(header + content[10:]).hexdigest() == sha256


# Dataset, labels ----------------------------------------------------------------------------------------------------


def small(**changes):
    x, y = torch.zeros(4, 2, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 1])
    fields = {"train_x": x, "train_y": y, "test_x": x[:2], "test_y": y[:2], **changes}
    return Dataset("a", **fields, num_classes=3, source="here")


def test_dataset_is_frozen_and_short_to_print():
    dataset = small()
    assert dataset.num_features == 6 and repr(dataset) == "Dataset(name='a', num_classes=3, source='here')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.num_classes = 5


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("train_x", torch.zeros(4, 6).half(), ValueError, "uint8 or float32 [n >= 1, *[6]], got torch.float16 [4, 6]"),
        ("train_x", torch.zeros(4), ValueError, "uint8 or float32 [n >= 1, *[]], got torch.float32 [4]"),
        ("train_x", torch.zeros(0, 6), ValueError, "uint8 or float32 [n >= 1, *[6]], got torch.float32 [0, 6]"),
        ("test_x", torch.zeros(2, 6), ValueError, "uint8 or float32 [n >= 1, *[2, 3]], got torch.float32 [2, 6]"),
        ("test_y", torch.tensor([0]), ValueError, "[2] labels, got [1]"),
        ("train_y", torch.zeros(4, 1).long(), ValueError, "[4] labels, got [4, 1]"),
        ("train_y", torch.tensor([0, 1, 2, 3]), ValueError, "in [0, 3), got 3"),
        ("train_y", torch.tensor([0, -1, 2, 1]), ValueError, "in [0, 3), got -1"),
        ("train_y", torch.zeros(4, dtype=torch.int32), TypeError, "int64 [n], got torch.int32 [4]"),
    ],
)
def test_dataset_errors(field, value, error, message):
    with refuses(error, f"{field} of here must be {message}"):
        small(**{field: value})


def test_validate_labels():
    validate_labels(torch.tensor([0, 1]))
    validate_labels(torch.tensor([3, 0]), 4, min_classes=2)
    validate_labels(torch.tensor([1, 1]), 4, min_classes=1)
    for labels, error, message in (
        (torch.tensor([0.0, torch.nan]), ValueError, "labels must be class indices, got nan at 1"),
        (torch.tensor([0.0, 1.0]), TypeError, "labels must be int64 [n], got torch.float32 [2]"),
        (torch.tensor([[0], [1]]), TypeError, "labels must be int64 [n], got torch.int64 [2, 1]"),
        (torch.tensor([0, -3]), ValueError, "labels must be in [0, classes), got -3"),
        (torch.tensor([0, 5]), ValueError, "labels must be in [0, 5), got 5"),
        (torch.tensor([2, 2, 2]), ValueError, "labels must have 2 classes or more, got 1"),
        (torch.tensor([], dtype=torch.int64), ValueError, "labels must have 2 classes or more, got 0"),
    ):
        with pytest.raises(error, match=re.escape(f"validate_labels: {message}")):
            validate_labels(labels, 5 if 5 in labels.flatten().tolist() else None)


# Normalization and batches ------------------------------------------------------------------------------------------


def test_normalization_by_hand():
    x = torch.tensor([[0, 4], [2, 10]], dtype=torch.uint8)
    whole = Normalization.from_data(x)  # mean 4, deviations -4, 0, -2, 6: variance 56 / 4
    assert whole.mean.tolist() == [4.0] and whole.std.tolist() == [pytest.approx(14**0.5)]
    feature = Normalization.from_data(x.float())  # columns 0, 2 and 4, 10
    assert feature.mean.tolist() == [1.0, 7.0] and feature.std.tolist() == [1.0, 3.0]
    images = torch.tensor([0, 2, 4, 10], dtype=torch.uint8).reshape(1, 2, 1, 2)
    channel = Normalization.from_data(images)  # channels 0, 2 and 4, 10, each for its two pixels
    assert channel.mean.tolist() == [1, 1, 7, 7] and channel.std.tolist() == [1, 1, 3, 3]
    assert Normalization.from_data(images, per="dataset").mean.tolist() == [4.0]


def test_normalization_agrees_with_numpy_over_many_chunks():
    x = torch.randint(0, 256, (4000, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = Normalization.from_data(x)
    assert whole.mean.item() == pytest.approx(x.numpy().mean(dtype=np.float64), rel=1e-6)
    assert whole.std.item() == pytest.approx(x.numpy().std(dtype=np.float64), rel=1e-6)
    y = torch.randn(4000, 200, generator=torch.Generator().manual_seed(0)) + 1000.0
    feature = Normalization.from_data(y)
    assert feature.std.numpy() == pytest.approx(y.double().numpy().std(0), rel=1e-6)


def test_constant_features_keep_their_scale():
    x = torch.full((49, 3), 0.1)  # times 1 / 49 the mean is not exact, and the deviation not quite 0
    x[:, 1] = torch.arange(49.0)
    statistics = Normalization.from_data(x)
    assert statistics.std[0] == statistics.std[2] == 1.0 and statistics.std[1] > 10
    (batch, _), *_ = batches(x, torch.zeros(49, dtype=torch.int64), 49, normalization=statistics)
    assert (batch[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("x", "per", "message"),
    [
        (torch.zeros(2, 2), "row", "per must be dataset, channel or feature, and x [n >= 1, features...], got 'row'"),
        (torch.zeros(0, 2), None, "x [n >= 1, features...], got 'feature' and [0, 2]"),
        (torch.zeros(3), None, "x [n >= 1, features...], got 'dataset' and [3]"),
        (torch.tensor([[torch.nan]]), None, "x must be finite, got nan or inf"),
        (torch.tensor([[torch.inf]]), "dataset", "x must be finite, got nan or inf"),
    ],
)
def test_normalization_errors(x, per, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Normalization.from_data(x, per)


X = torch.arange(7 * 6, dtype=torch.uint8).reshape(7, 2, 3)
Y = torch.arange(7)


def test_batches_in_order():
    got = list(batches(X, Y, 3))
    assert [x.shape for x, _ in got] == [(3, 6), (3, 6), (1, 6)]
    assert torch.cat([x for x, _ in got]).tolist() == X.flatten(1).tolist()
    assert torch.cat([y for _, y in got]).tolist() == list(range(7))
    assert all(x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in got)


def test_batches_drop_last_and_larger_than_the_data():
    assert [len(y) for _, y in batches(X, Y, 3, drop_last=True)] == [3, 3]
    assert [len(y) for _, y in batches(X, Y, 100)] == [7]
    assert list(batches(X, Y, 100, drop_last=True)) == []
    assert list(batches(X[:0], Y[:0], 3, shuffle=True)) == []


def test_batches_shuffle_by_the_generator_at_the_call():
    first, second = (batches(X, Y, 2, shuffle=True, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    torch.manual_seed(0)  # the order was drawn already
    first, second = (torch.cat([y for _, y in epoch]) for epoch in (first, second))
    assert first.equal(second) and first.sort().values.equal(Y) and not first.equal(Y)
    assert first.tolist() == torch.randperm(7, generator=torch.Generator().manual_seed(5)).tolist()
    generator = torch.Generator().manual_seed(5)
    epochs = [torch.cat([y for _, y in batches(X, Y, 2, shuffle=True, generator=generator)]).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]  # another order each epoch


def test_batches_pair_each_example_with_its_label():
    for x, y in batches(X, Y, 2, shuffle=True):
        assert (x[:, 0] == 6 * y).all()


def test_batches_of_chosen_rows():
    got = list(batches(X, Y, 2, indices=torch.tensor([6, 0, 3])))
    assert [y.tolist() for _, y in got] == [[6, 0], [3]] and got[0][0][0].tolist() == X[6].flatten().tolist()
    shuffled = torch.cat([y for _, y in batches(X, Y, 2, indices=torch.tensor([6, 0, 3]), shuffle=True)])
    assert sorted(shuffled.tolist()) == [0, 3, 6]
    assert list(batches(X, Y, 2, indices=torch.tensor([], dtype=torch.int64))) == []


def test_batches_normalise_without_touching_the_data():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    statistics = Normalization.from_data(x)
    ((got, _),) = batches(x, torch.zeros(9, dtype=torch.int64), 9, normalization=statistics)
    assert got.mean(0).abs().max() < 1e-6 and got.std(0, correction=0).numpy() == pytest.approx(np.ones(4), rel=1e-5)
    assert x.equal(before)
    list(batches(X, Y, 3, normalization=Normalization.from_data(X)))
    assert X.flatten().tolist() == list(range(42))


def test_batches_never_hold_a_float_copy():
    """One epoch over 32 MiB of uint8 must not raise the high-water mark by much more than one batch."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        pytest.skip("needs Linux's /proc")

    def peak_kib(field):
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text()).group(1))

    x, y = torch.ones(2**15, 2**10, dtype=torch.uint8), torch.zeros(2**15, dtype=torch.int64)
    statistics = Normalization.from_data(x)
    for warm_up in (True, False):
        before = peak_kib("VmRSS")
        clear.write_text("5")
        for batch, _ in batches(x, y, 256, shuffle=True, normalization=statistics):
            assert batch.dtype == torch.float32
        if not warm_up:
            assert peak_kib("VmHWM") - before < 8 * 1024  # a batch is 1 MiB; a float copy would be 128


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer >= 1, got 2.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer >= 1, got True"),
        ({"x": X.double()}, TypeError, "x must be uint8 or float32 [n, features...], got torch.float64 [7, 2, 3]"),
        ({"x": Y.float()}, TypeError, "x must be uint8 or float32 [n, features...], got torch.float32 [7]"),
        ({"y": Y[:6]}, ValueError, "y must have one label per row of x, [7], got [6]"),
        ({"indices": torch.tensor([7])}, ValueError, "indices must be int64 [m] in [0, 7), got tensor([7])"),
        ({"indices": torch.tensor([-1])}, ValueError, "indices must be int64 [m] in [0, 7), got tensor([-1])"),
        ({"indices": Y > 2}, ValueError, "indices must be int64 [m] in [0, 7), got tensor([False"),
        ({"indices": torch.tensor(3)}, ValueError, "indices must be int64 [m] in [0, 7), got 3"),
    ],
)
def test_batches_errors_come_at_the_call(arguments, error, message):
    with refuses(error, f"batches: {message}"):
        batches(**{"x": X, "y": Y, "batch_size": 2, **arguments})


# split --------------------------------------------------------------------------------------------------------------


def test_split_stratified_by_hand():
    y = torch.tensor([0] * 10 + [1] * 5 + [2] * 1)
    kept, held = split(y, 0.3)  # 3 of 10, round(1.5) = 2 of 5, none of the single one
    assert y[held].bincount(minlength=3).tolist() == [3, 2, 0]
    assert sorted(kept.tolist() + held.tolist()) == list(range(16))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())
    assert kept.dtype == held.dtype == torch.int64
    assert y[split(y, 0.99)[0]].bincount().tolist() == [1, 1, 1]  # never all of a class


def test_split_plain_and_seeded():
    y = torch.arange(100) % 10
    kept, held = split(y, 0.25, stratified=False)
    assert len(held) == 25 and len(kept) == 75
    first, again, other = (split(y, 0.25, seed=seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, float("nan"), "0.5", True])
def test_split_refuses_fractions(fraction):
    with refuses(ValueError, f"split: fraction must be a number in (0, 1), got {fraction!r}"):
        split(Y, fraction)


def test_split_that_would_hold_out_nothing():
    with refuses(ValueError, "split: fraction must hold out at least one of 7 rows, got 0.01"):
        split(Y, 0.01, stratified=False)
    with refuses(ValueError, "split: fraction must hold out at least one of 7 rows, got 0.5"):
        split(Y, 0.5)  # seven classes of one row
    with refuses(ValueError, "split: fraction must hold out at least one of 0 rows, got 0.5"):
        split(Y[:0], 0.5)
