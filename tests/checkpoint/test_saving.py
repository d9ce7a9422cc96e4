import json
import os
import random
import signal
import struct
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsenet as sn
from sparsenet import checkpoint, files
from sparsenet.checkpoint import encoding
from sparsenet.checkpoint.file import CheckpointFile

SIZES = [40, 64, 50, 7]


def make_model(seed=0, density=0.4, sizes=SIZES, block_size=8):
    generator = torch.Generator().manual_seed(seed)
    return sn.SparseMLP(sizes, density=density, block_size=block_size, generator=generator)


def make_run(seed=0, density=0.4, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True)):
    model = make_model(seed, density)
    optimizer = optimizer(model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=3, seed=seed)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100, cycle_momentum=False)
    return model, optimizer, sparsifier, scheduler


def train(run, steps):
    """Losses of some steps; inputs come from torch's global generator."""
    model, optimizer, sparsifier, scheduler = run
    losses = []
    for _ in range(steps):
        x = torch.randn(16, SIZES[0])
        loss = nn.functional.cross_entropy(model(x), torch.arange(16) % SIZES[-1])
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        sparsifier.step()
        losses.append(loss.item())
    return losses


def rewrite(path, tensors=None, header=None, **metadata):
    """Writes the file anew with some tensors or entries of the header replaced; None removes a tensor."""
    with CheckpointFile(path) as file:
        stored, content = {name: file.tensor(name) for name in file.names()}, file.header
    stored |= tensors or {}
    content = {**content, **(header or {})}
    metadata = {"sparsenet": json.dumps(content), **metadata}
    save_file({name: t for name, t in stored.items() if t is not None}, path, {k: v for k, v in metadata.items() if v})


def snapshot(model, *others):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [json.dumps(o.state_dict(), default=lambda t: t.tolist(), sort_keys=True) for o in others]


def assert_unchanged(before, model, *others):
    state, rest = snapshot(model, *others)
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[k], v) for k, v in before[0].items())
    assert rest == before[1]


# --- what comes back ---


OPTIMIZERS = {
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "two_groups": lambda p: torch.optim.Adam(
        [{"params": [q := list(p)][0][:2], "lr": 1e-2}, {"params": q[2:]}], lr=1e-3
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resumed_losses_are_the_same_bit_for_bit(tmp_path, optimizer):
    run = make_run(0, optimizer=optimizer)
    train(run, 7)
    sn.save(tmp_path / "c.safetensors", *run, step=7)
    expected = train(run, 8)
    other = make_run(5, density=0.15, optimizer=optimizer)
    parameters = list(other[0].parameters())
    found = sn.load(tmp_path / "c.safetensors", *other)
    assert all(a is b for a, b in zip(parameters, other[0].parameters(), strict=True))
    assert found.step == 7
    found.restore_random_state()
    assert train(other, 8) == expected
    assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True))


class Oddities(torch.optim.Optimizer):
    """State of all kinds: numbers, text, one number a block, nested lists, another dtype than the parameter's."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99), "note": None})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["calls"] = state.get("calls", 0) + 1
                state["word"] = "hello"
                state["history"] = [torch.full((2,), float(state["calls"])), (1, 2.5)]
                state["per_block"] = torch.arange(len(p), dtype=torch.float64)
                p.data.sub_(0.01 * state["calls"])


def test_state_of_an_unknown_optimizer(tmp_path):
    model = make_model()
    optimizer = Oddities(model.parameters())
    for _ in range(3):
        optimizer.step()
    sn.save(tmp_path / "c.safetensors", model, optimizer)
    twin = make_model(3, 0.2)
    other = Oddities(twin.parameters())
    sn.load(tmp_path / "c.safetensors", twin, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        mine, theirs = optimizer.state[p], other.state[q]
        assert (theirs["calls"], theirs["word"], theirs["history"][1]) == (3, "hello", (1, 2.5))
        assert torch.equal(theirs["history"][0], mine["history"][0])
        assert theirs["per_block"].dtype == torch.float64 and torch.equal(theirs["per_block"], mine["per_block"])
    assert other.param_groups[0]["betas"] == (0.9, 0.99)


def test_bfloat16_with_masks_and_dense_modules(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        sparse = sn.SparseLinear(30, 20, density=0.5, block_size=8, dtype=torch.bfloat16)
        pattern = sn.BlockPattern.random((10, 20), 0.5, 4)
        mask = torch.rand(pattern.num_blocks, 4, 4) < 0.5
        masked = sn.SparseLinear(20, 10, bias=False, pattern=pattern, element_mask=mask, dtype=torch.bfloat16)
        return nn.Sequential(sparse, nn.BatchNorm1d(20, dtype=torch.bfloat16), masked, nn.Linear(10, 3))

    model, other = make(0), make(1)
    model[1](torch.randn(9, 20, dtype=torch.bfloat16))
    sn.save(tmp_path / "c.safetensors", model)
    sn.load(tmp_path / "c.safetensors", other)
    assert_unchanged(snapshot(model), other)
    assert torch.equal(other[2].element_mask, model[2].element_mask)


def test_shared_and_strided_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            weight = torch.randn(6, 4, generator=generator)
            self.a = nn.Parameter(weight.T)
            self.b = self.a
            self.register_buffer("part", torch.arange(10.0)[2:5] * (seed + 1))

        def get_extra_state(self):
            return {"n": int(self.part[1]), "t": (1, None)}

        def set_extra_state(self, state):
            self.seen = state

    model, other = Odd(0), Odd(1)
    sn.save(tmp_path / "c.safetensors", model)
    sn.load(tmp_path / "c.safetensors", other)
    assert torch.equal(other.a, model.a) and other.a is other.b and torch.equal(other.part, model.part)
    assert other.seen == {"n": 3, "t": (1, None)}
    assert sum(name in ("a", "b") for name in load_file(tmp_path / "c.safetensors")) == 1


def test_extra_values_and_random_state(tmp_path):
    extra = {
        "numbers": [1, 2.5, float("inf"), True, None],
        "tuple": ("a", (2,)),
        3: {"@tensor": "not one"},
        "counter": Counter({5: 2}),
        "tensor": torch.arange(6).view(2, 3),
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
    }
    sn.save(tmp_path / "c.safetensors", make_model(), extra=extra)
    expected = torch.rand(4)
    found = sn.load(tmp_path / "c.safetensors", make_model())
    assert found.step == 0
    for key in ("numbers", "tuple", 3, "counter"):
        assert found.extra[key] == extra[key] and type(found.extra[key]) is type(extra[key])
    assert torch.equal(found.extra["tensor"], extra["tensor"])
    assert found.extra["a/b"].item() == 1 and found.extra["a"]["b"].item() == 0
    assert not torch.equal(torch.rand(4), expected)
    found.restore_random_state()
    assert torch.equal(torch.rand(4), expected)


def test_model_tensors_are_a_plain_state_dict(tmp_path):
    model, other = make_model(0), make_model(1, 0.2)
    sn.save(tmp_path / "c.safetensors", model)
    state = {name: t for name, t in load_file(tmp_path / "c.safetensors").items() if not name.startswith("@")}
    other.load_state_dict(state)
    assert_unchanged(snapshot(model), other)


def test_data_parallel_wrappers_are_looked_through(tmp_path):
    model = make_model()
    wrapped = sn.distributed.DataParallel.__new__(sn.distributed.DataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    sn.save(tmp_path / "c.safetensors", wrapped)
    other = make_model(1)
    sn.load(tmp_path / "c.safetensors", other)
    assert_unchanged(snapshot(model), other)


def test_describe_reads_the_header_alone(tmp_path):
    run = make_run()
    train(run, 4)
    sn.save(tmp_path / "c.safetensors", *run, step=4, extra={"note": "x"})
    found = checkpoint.describe(tmp_path / "c.safetensors")
    assert (found.step, found.format_version, found.extra) == (4, 1, {"note": "x"})
    assert found.parts == ("optimizer", "sparsifier", "scheduler")
    layer = run[0][1]
    assert found.layers["1"]["num_blocks"] == layer.pattern.num_blocks
    assert found.tensors["1.values"] == ("F32", tuple(layer.values.shape), layer.values.numel() * 4)
    assert found.file_bytes == (tmp_path / "c.safetensors").stat().st_size


def test_loading_needs_little_more_memory_than_the_model(run_child, tmp_path):
    code = """
        import sys, torch, sparsenet as sn
        import sparsenet.checkpoint  # what loading code takes is not what is asked
        def make():
            model = sn.SparseMLP([2048, 2048, 2048], density=0.5)
            return model, torch.optim.AdamW(model.parameters(), fused=True)
        sn.memory.release_freed_memory()
        model, optimizer = make()
        model(torch.randn(8, 2048)).sum().backward(); optimizer.step(); optimizer.zero_grad()
        weights = sum(p.numel() * 4 for p in model.parameters())
        with sn.measure_peak() as saving:
            sn.save(sys.argv[1], model, optimizer)
        del model, optimizer
        with sn.measure_peak() as loading:
            sn.load(sys.argv[1], *make())
        print(saving.bytes / weights, loading.bytes / weights)
    """
    saving, loading = map(float, run_child(code, str(tmp_path / "c.safetensors")).stdout.split())
    assert saving < 0.3
    assert loading < 4.0, "new weights beside old ones, then two moments"


# --- refused: files ---


def refused(path, message, *run):
    """Loading raises, with ``message``, and changes nothing."""
    run = run or (make_model(1, 0.2),)
    before = snapshot(*run)
    with pytest.raises(ValueError, match=message):
        sn.load(path, *run)
    assert_unchanged(before, *run)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "c.safetensors"
    sn.save(path, make_model())
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_truncated_files(saved, keep):
    content = saved.read_bytes()
    keep = int(len(content) * keep) if isinstance(keep, float) else keep
    saved.write_bytes(content[:keep])
    refused(saved, "load: .* must be a whole safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 3])
def test_absurd_header_lengths(saved, length):
    saved.write_bytes(struct.pack("<Q", length) + saved.read_bytes()[8:])
    refused(saved, "load: .* must be a whole safetensors file")


def test_damaged_bytes_never_crash(saved):
    content = saved.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(header)] = chance.randrange(256)
        saved.write_bytes(damaged)
        try:
            sn.load(saved, make_model(1, 0.2))
        except (ValueError, OSError) as error:
            assert str(error).startswith("load: ")


def test_pickles(tmp_path):
    for old_format, name in ((False, "zip.pt"), (True, "old.pt")):
        path = tmp_path / name
        torch.save(make_model().state_dict(), path, _use_new_zipfile_serialization=not old_format)
        refused(path, "load: .* must be a safetensors file, got a pickle .torch.save., which is never read")


def test_a_pickle_is_never_executed(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    for protocol in range(6):
        path = tmp_path / f"{protocol}.safetensors"
        path.write_bytes(pickle.dumps(Trap(), protocol))
        refused(path, "load: ")
    assert not (tmp_path / "sprung").exists()


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load: .*nothing.safetensors does not exist"):
        sn.load(tmp_path / "nothing.safetensors", make_model())
    with pytest.raises(IsADirectoryError, match=r"load: .* must be a file, got a folder"):
        sn.load(tmp_path, make_model())


def test_newer_format_version(saved):
    rewrite(saved, header={"format_version": 2})
    refused(saved, "must have a format version up to 1, got 2: a newer sparsenet wrote it")


@pytest.mark.parametrize(
    "header",
    [
        {"format_version": "1"},
        {"format_version": 0},
        {"step": -1},
        {"step": "7"},
        {"layers": []},
        {"model": None},
        {"aliases": 3},
        {"extra": {"@unknown": 1}},
        {"extra": {"@dict": [[{"@dict": []}, 1]]}},
        {"extra": {"a": 1, "b": 2}},
        {"extra": {"@tensor": ["a"]}},
    ],
)
def test_headers_of_others(saved, header):
    rewrite(saved, header=header)
    refused(saved, "load: .* must have a header that sparsenet.save wrote, got")


def test_other_safetensors_files(saved):
    save_file({"values": torch.ones(3)}, saved)
    refused(saved, "must be a checkpoint of sparsenet.save, got another safetensors file")
    save_file({"values": torch.ones(3)}, saved, {"sparsenet": "[" * 100_000})
    refused(saved, "must have a header that sparsenet.save wrote")


def test_header_that_names_a_tensor_that_is_not_there(saved):
    rewrite(saved, header={"extra": {"@tensor": "@extra/lost"}})
    refused(saved, "must hold the tensor '@extra/lost' that its header names")
    rewrite(saved, header={"extra": None, "aliases": {"1.bias": "../../etc/passwd"}})
    refused(saved, "must hold the tensor '1.bias' that its header names|must hold this model")


# --- refused: contents ---


HOSTILE = {
    "column too large": ("1.col_indices", lambda t: t.index_fill(0, torch.tensor([2]), 8)),
    "largest int32": ("1.col_indices", lambda t: t.index_fill(0, torch.tensor([2]), 2**31 - 1)),
    "negative": ("1.col_indices", lambda t: t.index_fill(0, torch.tensor([0]), -1)),
    "unsorted": ("1.col_indices", lambda t: t.flip(0)),
    "beyond int32": ("1.col_indices", lambda t: t.long() + 2**32),
    "floats": ("1.col_indices", lambda t: t.float()),
    "pointer not monotone": ("1.crow_indices", lambda t: t.index_fill(0, torch.tensor([3]), 10**6)),
    "pointers too short": ("1.crow_indices", lambda t: t[:-1].clone()),
    "pointers end elsewhere": ("1.crow_indices", lambda t: t + 1),
    "one block more": ("1.values", lambda t: torch.cat([t, t[:1]])),
    "another block size": ("1.values", lambda t: t.reshape(-1, 4, 16)),
    "integer values": ("1.values", lambda t: t.int()),
}


@pytest.mark.parametrize(("name", "change"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_topology_never_reaches_a_kernel(saved, name, change):
    with CheckpointFile(saved) as file:
        good = file.tensor(name)
    rewrite(saved, {name: change(good)})
    refused(saved, "load: .* must hold layer '1': ")


def test_number_of_blocks_shows_both(saved):
    with CheckpointFile(saved) as file:
        blocks = len(file.tensor("2.col_indices"))
        rewrite(saved, {"2.values": file.tensor("2.values")[:-1].clone()})
    refused(saved, f"values must have one block per index, got {blocks - 1} for {blocks}")


def test_other_sizes_show_both(saved):
    other = make_model(sizes=[40, 64, 48, 7])
    refused(saved, "must hold layer '1' as 64 -> 48 with blocks of 8, got 64 -> 50 with blocks of 8", other)
    other = make_model(block_size=16)
    refused(saved, "must hold layer '0' as 40 -> 64 with blocks of 16, got 40 -> 64 with blocks of 8", other)
    rewrite(saved, header={"layers": {}})  # a file that does not say: the tensors do
    refused(saved, "must hold layer '0': SparseLinear: values must have shape", other)


def test_other_models_show_what_is_missing(saved):
    refused(saved, "missing in the file .'3.bias', .* not in the model \\[\\]", make_model(sizes=[40, 64, 50, 7, 5]))
    refused(saved, "missing in the file \\[\\], not in the model .'2.bias'", make_model(sizes=[40, 64, 50]))


def test_other_shapes_show_both(tmp_path):
    sn.save(tmp_path / "c.safetensors", nn.Linear(4, 3))
    refused(tmp_path / "c.safetensors", r"must hold weight of shape \[5, 4\], got \[3, 4\]", nn.Linear(4, 5))


def test_parts_that_are_not_there(saved):
    run = make_run(1)
    for part, things in (
        ("optimizer", run[:2]),
        ("sparsifier", (run[0], None, run[2])),
        ("scheduler", (run[0], None, None, run[3])),
    ):
        before = snapshot(run[0], *run[1:])
        with pytest.raises(ValueError, match=f"must hold an? {part}'s state, got none"):
            sn.load(saved, *things)
        assert_unchanged(before, run[0], *run[1:])


def test_state_of_other_optimizers_and_schedulers(tmp_path):
    path, run = tmp_path / "c.safetensors", make_run()
    train(run, 2)
    sn.save(path, *run)
    model = make_model(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    refused(path, "must hold the state of a SGD with .*'momentum'", model, sgd)
    two = torch.optim.AdamW([{"params": list(model[0].parameters())}, {"params": list(model[1:].parameters())}])
    refused(path, "must hold the state of an optimizer over .*, got", model, two)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(run[1], 10)
    before = snapshot(*run)
    with pytest.raises(ValueError, match="must hold the state of a CosineAnnealingLR with"):
        sn.load(path, *run[:3], cosine)
    assert_unchanged(before, *run)


@pytest.mark.parametrize("shape", [(3,), (1000, 8, 8), (0, 8, 8), (8, 8)])
def test_optimizer_state_of_another_shape(tmp_path, shape):
    path, run = tmp_path / "c.safetensors", make_run()
    train(run, 2)
    sn.save(path, *run)
    with CheckpointFile(path) as file:
        name = next(n for n in file.names() if n.endswith("state/0/exp_avg"))
    rewrite(path, {name: torch.zeros(shape)})
    refused(path, r"must hold exp_avg of 0.values with the shape \[\d+, 8, 8\], got", *make_run(1)[:2])


def test_optimizer_part_of_others(tmp_path):
    path, run = tmp_path / "c.safetensors", make_run()
    train(run, 1)
    sn.save(path, *run)
    with CheckpointFile(path) as file:
        names = dict(file.header["optimizer"]["@dict"])["names"]
    for state in (None, {"@dict": [["state", {"@dict": []}]]}, {"@dict": [["state", 3], ["param_groups", []]]}):
        rewrite(path, header={"optimizer": {"@dict": [["names", names], ["state", state]]}})
        refused(path, "must hold an optimizer's state and its 1 param_groups", *make_run(1)[:2])
    groups = [encoding.encode(g, "", {}) for g in run[1].state_dict()["param_groups"]]
    state = {"@dict": [["state", {"@dict": [[0, 7]]}], ["param_groups", groups]]}
    rewrite(path, header={"optimizer": {"@dict": [["names", names], ["state", state]]}})
    refused(path, "must hold the state of 0.values by name, got 7", *make_run(1)[:2])


def test_what_cannot_be_saved(tmp_path):
    model, path = make_model(), tmp_path / "c.safetensors"
    with pytest.raises(TypeError, match="save: extra/a/1 must be numbers, text, lists, dicts and tensors, got object"):
        sn.save(path, model, extra={"a": [1, object()]})
    for step in (-1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="save: step must be an integer >= 0, got"):
            sn.save(path, model, step=step)
    foreign = torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)
    with pytest.raises(
        ValueError, match=r"save: optimizer must hold parameters of the model, got another of shape \[2, 3\]"
    ):
        sn.save(path, model, foreign)
    odd = nn.ModuleDict({"@x": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"save: names in the model must not begin with @, got '@x\.weight'"):
        sn.save(path, odd)
    assert not path.exists() and not list(tmp_path.iterdir())


# --- written whole or not at all ---


def test_writing_fails_and_the_old_file_stays(saved, run_child):
    content = saved.read_bytes()
    code = """
        import resource, sys, sparsenet as sn
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # as a full disk: no file may grow beyond this
        try:
            sn.save(sys.argv[1], sn.SparseMLP([400, 400, 7], density=0.5))
        except OSError as error:
            print(error.errno, error)
    """
    number, said = run_child(code, str(saved)).stdout.split(" ", 1)
    assert int(number) == 27 and "could not be written, what was there is untouched: File too large" in said
    assert saved.read_bytes() == content
    assert os.listdir(saved.parent) == [saved.name]


def test_full_disk(tmp_path):
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=64k none {tmp_path} 2>/dev/null") != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        path = tmp_path / "c.safetensors"
        sn.save(path, sn.SparseMLP([16, 16], density=1.0, block_size=16))
        content = path.read_bytes()
        with pytest.raises(OSError, match="could not be written, what was there is untouched: No space left on device"):
            sn.save(path, sn.SparseMLP([400, 400], density=1.0))
        assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]
    finally:
        os.system(f"umount {tmp_path}")


def test_folder_that_is_not_there_or_not_ours(tmp_path):
    with pytest.raises(OSError, match="could not be written, what was there is untouched: No such file"):
        sn.save(tmp_path / "no" / "c.safetensors", make_model())
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="could not be written, what was there is untouched: Not a directory"):
        sn.save(tmp_path / "file" / "c.safetensors", make_model())
    if os.geteuid() == 0:
        return  # may write anywhere
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="could not be written"):
        sn.save(tmp_path / "c.safetensors", make_model())


def test_symbolic_links_and_permissions_are_kept(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(real)
    sn.save(link, make_model())
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o666 & ~_umask()
    real.chmod(0o640)
    sn.save(link, make_model())
    assert real.stat().st_mode & 0o777 == 0o640


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_left_overs_of_killed_writers_are_swept(saved):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    host = files.socket.gethostname()
    dead = saved.parent / f".{saved.name}.{host}.{process}.0123abcd.part"
    alive = saved.parent / f".{saved.name}.{host}.{os.getppid()}.0123abcd.part"
    elsewhere = saved.parent / f".{saved.name}.another-host.{process}.0123abcd.part"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
        (folder / "x").write_text("x")
    sn.save(saved, make_model())
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def kill_while_saving(path, rounds):
    """Processes that save without end are killed at random moments; what they leave always loads."""
    chance, steps = random.Random(0), []
    for number in range(rounds):
        heard, told = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                model = make_model(number)
                for step in range(10**6):
                    sn.save(path, model, step=number * 10**6 + step)
                    os.write(told, b".")
            finally:
                os._exit(1)
        os.read(heard, 1)  # it has saved at least once
        time.sleep(chance.uniform(0, 0.02))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(heard)
        os.close(told)
        steps.append(sn.load(path, make_model(99)).step)
        assert steps[-1] // 10**6 == number, "a file of the process that was just killed"
    sn.save(path, make_model())
    assert os.listdir(path.parent) == [path.name], "nothing is left of those that were killed"


def test_killed_while_saving(tmp_path):
    kill_while_saving(tmp_path / "c.safetensors", 15)


@pytest.mark.slow
def test_killed_while_saving_many_times(tmp_path):
    kill_while_saving(tmp_path / "c.safetensors", 300)
