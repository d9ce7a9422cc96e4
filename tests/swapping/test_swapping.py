"""Swapping: what a swapped layer keeps, what is refused and named, and the report of what was done."""

from __future__ import annotations

import copy
import logging
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import sparsenet as sn
from sparsenet import SparseLinear, densify_, sparsify_


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def nothing_changed(model: nn.Module, before: dict[str, object], action, error, message: str) -> None:
    """``action`` is refused with ``message``, and no attribute of any module is another object than before."""
    with pytest.raises(error, match=message):
        action()
    assert {k: v for k, v in contents(model).items() if before.get(k) is not v} == {}
    assert contents(model).keys() == before.keys()


def contents(model: nn.Module) -> dict[str, object]:
    """Everything that the modules of ``model`` hold, by name."""
    return {
        f"{name}:{key}:{k}": v
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        for k, v in (value.items() if isinstance(value, dict) else [("", value)])
    }


# --- layers whose weight is not simply a weight ---


def _old_norm(apply):
    def changed(linear):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
            apply(linear)

    return changed


def _replaced_weight(make):
    def changed(linear):
        linear.weight = nn.Parameter(make(linear.weight.detach()), requires_grad=False)

    return changed


class Marked(torch.Tensor):
    """A tensor that is more than one."""


REFUSED = [
    (
        "pruned",
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        r"weight of '0'.* pruned; .*prune\.remove\(module, 'w",
    ),
    ("pruned bias", lambda m: prune.l1_unstructured(m, "bias", 0.5), r"bias of '0'.* pruned; .*prune\.remove"),
    ("parametrized", lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()), "remove_parametrizations"),
    ("weight norm", parametrizations.weight_norm, r"remove_parametrizations\(module, 'weight'\)"),
    ("spectral norm", parametrizations.spectral_norm, "weight of '0'.* parametrized"),
    ("orthogonal", parametrizations.orthogonal, "weight of '0'.* parametrized"),
    ("old weight norm", _old_norm(weight_norm), r"remove_weight_norm\(module, 'weight'\)"),
    ("old spectral norm", _old_norm(spectral_norm), r"remove_spectral_norm\(module, 'weight'\)"),
    ("no parameter", lambda m: m.__dict__.update(weight=m._parameters.pop("weight").data), "made by other code"),
    ("integers", _replaced_weight(lambda w: w.to(torch.int8)), "weight of '0' must be float32.* got torch.int8"),
    ("complex", _replaced_weight(lambda w: w.to(torch.complex64)), "weight of '0' must be float32.* torch.complex64"),
    ("sparse", _replaced_weight(lambda w: w.to_sparse()), "weight of '0' must be an ordinary dense tensor, got .*coo"),
    (
        "mkldnn",
        _replaced_weight(lambda w: w.to_mkldnn()),
        "weight of '0' must be an ordinary dense tensor, got .*mkldnn",
    ),
    (
        "subclass",
        _replaced_weight(lambda w: w.as_subclass(Marked)),
        "a plain torch.nn.Parameter, got Marked; swap before",
    ),
    ("meta", _replaced_weight(lambda w: w.to("meta")), "weight of '0' must hold data, got a meta tensor; load"),
    ("gathered elsewhere", _replaced_weight(lambda w: w[:0]), r"weight of '0' must be \[128, 64\].*got \[0, 64\]"),
    (
        "other dtypes",
        lambda m: setattr(m, "bias", nn.Parameter(m.bias.double())),
        "bias of '0' must be .* of one dtype",
    ),
    ("NaN", lambda m: m.weight.data.fill_(torch.nan), "weight of '0' must not contain NaN"),
    ("hook on the weight", lambda m: m.weight.register_hook(lambda g: 2 * g), "weight of '0' must have no hooks"),
    (
        "hook after accumulation",
        lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
        "weight of '0' must have no hooks",
    ),
    (
        "another forward",
        lambda m: setattr(m, "forward", lambda x: x),
        "'0' must compute as any Linear, got its own forw",
    ),
    ("a bound method", lambda m: setattr(m, "_old", types.MethodType(nn.Linear.forward, m)), "got its own _old"),
    ("compiled", lambda m: m.compile(backend="eager"), "'0' must be swapped before it is compiled"),
    ("an attribute of ours", lambda m: setattr(m, "density", 3), "'0' must not hold a 'density' of its own"),
    (
        "a buffer of ours",
        lambda m: m.register_buffer("col_indices", torch.ones(2)),
        "'0' must not hold a 'col_indices'",
    ),
]


@pytest.mark.parametrize(("what", "change", "message"), REFUSED, ids=[what for what, *_ in REFUSED])
def test_row79_what_cannot_be_swapped_rightly_is_refused_by_name(what, change, message):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    change(model[0])
    before = contents(model)
    nothing_changed(model, before, lambda: sparsify_(model, 0.25, 16), (ValueError, TypeError), message)
    report = sparsify_(model, 0.25, 16, filter_fn=lambda name, linear: name != "0")  # the others can be swapped
    assert list(report.layers) == ["2"] and report.left == {"0": "left out by filter_fn"}
    assert isinstance(model[2], SparseLinear) and model[0] is not None and not isinstance(model[0], SparseLinear)


@pytest.mark.parametrize(
    ("undo", "apply"),
    [
        (lambda m: prune.remove(m, "weight"), lambda m: prune.l1_unstructured(m, "weight", 0.5)),
        (lambda m: parametrize.remove_parametrizations(m, "weight"), parametrizations.weight_norm),
    ],
)
def test_row79_the_remedy_that_is_named_works(undo, apply):
    model = network()
    apply(model[0])
    undo(model[0])
    weight, x = model[0].weight.detach().clone(), torch.randn(3, 64)
    expected = model(x)
    assert list(sparsify_(model, 1.0, 16).layers) == ["0", "2"]
    assert torch.equal(model[0].weight_dense(), weight)
    torch.testing.assert_close(model(x), expected)


def test_row79_a_lazy_layer_gets_its_weight_first():
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 16))
    before = contents(model)
    message = "sparsify_: '0' must have its weight, got a lazy layer; run one batch through it first"
    nothing_changed(model, before, lambda: sparsify_(model, 0.5, 8), ValueError, message)
    model(torch.randn(2, 24))
    assert list(sparsify_(model, 0.5, 8).layers) == ["0", "1"] and model[0].in_features == 24


def test_row79_our_own_values_are_refused_on_the_way_back():
    model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=16)
    prune.l1_unstructured(model[1], "values", 0.5)
    before = contents(model)
    nothing_changed(
        model, before, lambda: densify_(model), ValueError, r"values of '1'.*prune\.remove\(module, 'values"
    )

    class Doubled(SparseLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(SparseLinear(16, 16, density=1.0, block_size=8), Doubled(16, 16, density=1.0, block_size=8))
    before = contents(model)
    message = "densify_: '1' must compute as any SparseLinear, got its own forward"
    nothing_changed(model, before, lambda: densify_(model), ValueError, message)
    model = nn.Sequential(SparseLinear(16, 16, density=1.0, block_size=8))
    handle = model[0].values.register_hook(lambda g: g)
    nothing_changed(model, contents(model), lambda: densify_(model), ValueError, "values of '0' must have no hooks")
    handle.remove()
    assert type(densify_(model)[0]) is nn.Linear


def test_row79_weights_that_share_memory_are_refused_with_a_way_out():
    """As one Parameter, as two over one memory, and as two attributes of one layer."""
    tied = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
    tied[1].weight = tied[0].weight
    aliased = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
    aliased[1].weight = nn.Parameter(aliased[0].weight.data)
    for model in (tied, aliased):
        message = r"the weight of '1' must not be shared, got it in '0.weight' too.*filter_fn=.*: name != '1'"
        nothing_changed(model, contents(model), lambda model=model: sparsify_(model, 0.5, 8), ValueError, message)
    twice = nn.Sequential(nn.Linear(16, 16))
    twice[0].again = twice[0].weight
    nothing_changed(twice, contents(twice), lambda: sparsify_(twice, 0.5, 8), ValueError, "got it in '0.again' too")


def test_row79_a_bias_in_two_layers_stays_one():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].bias = model[0].bias
    calls, bias = [], model[0].bias
    bias.register_hook(calls.append)
    sparsify_(model, 0.5, 8)
    assert model[0].bias is model[1].bias is bias
    model(torch.randn(2, 16)).sum().backward()
    assert calls
    densify_(model)
    assert model[0].bias is model[1].bias is bias


def test_row79_a_wrapped_model_is_swapped_before_it_is_wrapped(tmp_path):
    """DistributedDataParallel would go on averaging the gradients of weights that are no longer there."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network())
        message = "sparsify_: model must be swapped before it is wrapped: DistributedDataParallel watches"
        nothing_changed(wrapped, contents(wrapped), lambda: sparsify_(wrapped, 0.5, 16), ValueError, message)
    finally:
        dist.destroy_process_group()


# --- the report ---


class Mixed(nn.Module):
    """Everything that holds a matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.lstm = nn.LSTM(16, 16)
        self.conv = nn.LazyConv2d(4, 3)
        self.norm = nn.LayerNorm(16)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
        self.head = nn.Linear(16, 8)
        self.sparse = SparseLinear(16, 16, density=0.5, block_size=8)


def test_row80_the_report_says_what_was_swapped_and_what_was_left_and_why():
    model = Mixed()
    report = sparsify_(model, 0.5, 8, filter_fn=lambda name, linear: name != "head")
    assert report.model is model and list(report.layers) == ["ffn.0", "ffn.2"]
    first = report.layers["ffn.0"]
    assert first.shape == (32, 16) and first.block_size == 8 and first.num_blocks == 4 and first.density == 0.5
    assert first.blocks_per_row == 1.0 and first.dense_bytes == 32 * 16 * 4
    assert first.sparse_bytes == 4 * (8 * 8 * 4 + 24)
    assert report.left == {
        "embed": "Embedding is not an nn.Linear",
        "attention": "MultiheadAttention is not an nn.Linear",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass of nn.Linear, which other code may know",
        "lstm": "LSTM is not an nn.Linear",
        "conv": "LazyConv2d is not an nn.Linear",
        "head": "left out by filter_fn",
        "sparse": "sparse already",
    }


def test_row80_the_report_is_a_table():
    report = sparsify_(Mixed(), 0.5, 8, filter_fn=lambda name, linear: name != "head")
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "out",
        "x",
        "in",
        "block",
        "blocks",
        "per",
        "row",
        "density",
        "KiB",
        "before",
        "KiB",
        "after",
    ]
    assert lines[1].split() == ["ffn.0", "32", "x", "16", "8", "4", "1.0", "50.00%", "2.0", "1.1"]
    assert lines[3].split() == ["total", "8", "50.00%", "4.0", "2.2"]
    assert len({len(line) for line in lines[:4]}) == 1  # columns stand under each other
    assert lines[4] == "left as they are" and lines[-1].split(maxsplit=1) == ["sparse", "sparse already"]
    assert str(sparsify_(nn.Linear(16, 16), 0.5, 8)).splitlines()[1].startswith("(the model)")


def test_row80_the_report_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="sparsenet"):
        report = sparsify_(network(), 0.5, 16)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.getMessage() == f"sparsify_:\n{report}"


def test_row80_only_rank_0_says_it(caplog, monkeypatch):
    monkeypatch.setattr(sn.distributed, "is_active", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with caplog.at_level(logging.INFO, logger="sparsenet"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsify_(network(), 0.5, 16).layers and not sparsify_(nn.ReLU()).layers
    assert not caplog.records


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (nn.ReLU(), {}, "it holds no nn.Linear"),
        (nn.Linear(16, 16), {"filter_fn": lambda *_: False}, "the model: left out by filter_fn"),
        (sn.SparseMLP([16, 16, 16], 0.5, 8), {}, "'0': sparse already; '1': sparse already"),
        (nn.Sequential(*(nn.Embedding(4, 4) for _ in range(7))), {}, "'4': Embedding is not an nn.Linear; and 2 more"),
    ],
    ids=["no linear", "filter", "sparse already", "many"],
)
def test_row80_swapping_nothing_is_a_warning_with_the_reasons(model, options, reason):
    with pytest.warns(UserWarning, match=r"sparsify_: no layer was swapped \(") as seen:
        report = sparsify_(model, 0.5, 8, **options)
    assert reason in str(seen[0].message) and seen[0].filename == __file__
    assert report.model is model and not report.layers and "no layer was swapped" in str(report)


def test_row80_packed_layers_are_named_without_their_insides():
    class QuantLinear(nn.Module):
        """Integers in a buffer, as quantized models keep them."""

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self._packed_params = nn.Module()
            self._packed_params.inner = nn.Embedding(3, 3)

    report = sparsify_(nn.Sequential(QuantLinear(), Packed(), nn.Linear(16, 16)), 0.5, 8)
    assert report.left == {"0": "QuantLinear is not an nn.Linear", "1": "Packed is quantized"}
    assert list(report.layers) == ["2"]


# --- what a swapped layer keeps ---

HOOKS = {
    "forward_pre": lambda m, f: m.register_forward_pre_hook(lambda *_: f()),
    "forward_pre with kwargs": lambda m, f: m.register_forward_pre_hook(lambda m, a, k: f(), with_kwargs=True),
    "forward": lambda m, f: m.register_forward_hook(lambda *_: f()),
    "forward with kwargs": lambda m, f: m.register_forward_hook(lambda m, a, k, y: f(), with_kwargs=True),
    "forward always": lambda m, f: m.register_forward_hook(lambda *_: f(), always_call=True),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *_: f()),
    "backward_pre": lambda m, f: m.register_full_backward_pre_hook(lambda *_: f()),
    "state_dict": lambda m, f: m.register_state_dict_post_hook(lambda *_: f()),
    "state_dict_pre": lambda m, f: m.register_state_dict_pre_hook(lambda *_: f()),
    "load_post": lambda m, f: m.register_load_state_dict_post_hook(lambda *_: f()),
}


def exercise(model: nn.Module) -> None:
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", HOOKS)
def test_row80_hooks_are_carried_over_there_and_back(kind):
    """And the handle that was returned goes on removing them."""
    model, calls = network(), []
    handle = HOOKS[kind](model[0], lambda: calls.append(1))
    for swap in (lambda: None, lambda: sparsify_(model, 0.5, 16), lambda: densify_(model)):
        swap()
        calls.clear()
        exercise(model)
        assert len(calls) == 1, swap
    sparsify_(model, 0.5, 16)
    handle.remove()
    calls.clear()
    exercise(model)
    assert not calls


def test_row80_hooks_get_the_module_that_is_there_now():
    model, seen = network(), []
    model[0].register_forward_hook(lambda module, *_: seen.append(module))
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    sparsify_(model, 0.5, 16)
    exercise(model)
    for hook in model[0]._load_state_dict_pre_hooks.values():
        hook({}, "0.", {}, True, [], [], [])
    assert len(seen) >= 2 and all(module is model[0] for module in seen)


def test_row80_hooks_of_a_layer_with_an_activation_see_its_output():
    model, seen = sn.SparseMLP([64, 32, 10], 0.5, 16, activation="relu"), []
    model[0].register_forward_hook(lambda module, x, y: seen.append(y))
    densify_(model)
    model(torch.randn(5, 64))
    (output,) = seen
    assert (output >= 0).all() and isinstance(model[0], nn.Sequential)


def test_row80_what_was_added_to_a_layer_is_carried_over_there_and_back():
    model = network()
    linear = model[0]
    linear.name_for_logs, linear.rate = "first", 0.5
    linear.register_buffer("seen", torch.zeros(3))
    linear.register_buffer("scratch", torch.zeros(2), persistent=False)
    linear.scale = nn.Parameter(torch.ones(1))
    linear.probe = nn.Linear(64, 4)
    linear.weight.no_decay = True
    linear.requires_grad_(False).eval()
    linear.bias.requires_grad_(True)
    kept = {key: getattr(linear, key) for key in ("name_for_logs", "rate", "seen", "scratch", "scale", "bias")}
    report = sparsify_(model, 0.5, 4)
    assert list(report.layers) == ["0", "0.probe", "2"] and isinstance(model[0].probe, SparseLinear)
    for layer, weight in ((model[0], "values"), (densify_(model)[0], "weight")):
        assert all(getattr(layer, key) is value for key, value in kept.items())
        assert set(layer.state_dict()) >= {"seen", "scale"} and "scratch" not in layer.state_dict()
        assert {"scale", "bias"} <= dict(layer.named_parameters()).keys()
        assert getattr(layer, weight).no_decay and not getattr(layer, weight).requires_grad
        assert layer.bias.requires_grad and not layer.training and model[2].training
    assert type(model[0]) is type(model[0].probe) is nn.Linear


def test_row80_a_layer_without_bias_goes_there_and_back():
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(3, 64)
    expected = model(x)
    sparsify_(model, 1.0, 16)
    assert model[0].bias is None and torch.allclose(model(x), expected, atol=1e-5)
    densify_(model)
    assert model[0].bias is None and torch.allclose(model(x), expected, atol=1e-5)
    assert model.state_dict().keys() == {"0.weight"}


def test_row80_plain_references_of_modules_follow():
    """Attributes that torch does not register, lists and dictionaries, of any module of the model."""
    model = network()
    object.__setattr__(model, "alias", model[0])
    model.order, model.by_name = [model[2], "other"], {"first": model[0]}
    sparsify_(model, 0.5, 16)
    assert model.alias is model[0] and model.order == [model[2], "other"] and model.by_name["first"] is model[0]
    densify_(model)
    assert model.alias is model[0] and type(model.order[0]) is nn.Linear


def test_row80_densify_draws_no_random_numbers():
    model = network()
    sparsify_(model, 0.5, 16)
    before = torch.get_rng_state()
    densify_(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_row80_a_compiled_model_is_swapped_inside():
    model, x = network(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = sparsify_(compiled, 0.5, 16)
    assert report.model is compiled and isinstance(model[0], SparseLinear)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


def test_row80_densify_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="densify_: model must be a torch.nn.Module, got int"):
        densify_(3)
