"""SparseLinear's state dict: what others add, strict and assign, failed loads, models on meta."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear


class Extended(SparseLinear):
    """With everything that a subclass can add to a module."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.norm = nn.LayerNorm(4)
        self.note = "fresh"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def make(kind=SparseLinear, density=0.5, **more):
    return kind(64, 48, density=density, block_size=16, **more)


def make_masked(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pattern = BlockPattern.random((48, 64), 0.5, 16, generator)
    mask = torch.rand(pattern.num_blocks, 16, 16, generator=generator, device="cpu") < 0.5
    return SparseLinear(64, 48, pattern=pattern, element_mask=mask)


def everything(model):
    """All that a model holds, copied."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in model.state_dict().items()}


def assert_holds(model, expected):
    now = everything(model)
    assert now.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(now[key], value) if isinstance(value, torch.Tensor) else now[key] == value, key


# --- what others add ---


def test_row76_what_a_subclass_adds_is_saved_and_loaded():
    source, target = make(Extended, 0.5), make(Extended, 0.25)
    with torch.no_grad():
        source.scale.fill_(3.0)
        source.seen.fill_(7.0)
        source.norm.weight.fill_(2.0)
        source.note = "kept"
    assert "passing" not in source.state_dict()
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert target.scale.tolist() == [3.0] * 3 and target.seen == 7 and target.norm.weight[0] == 2
    assert target.note == "kept" and target.pattern == source.pattern and torch.equal(target.values, source.values)
    nested, other = (nn.Sequential(nn.Linear(2, 64), layer) for layer in (source, make(Extended, 0.25)))
    other.load_state_dict(nested.state_dict())
    assert_holds(other, everything(nested))
    for key in ("scale", "seen", "norm.weight", "_extra_state"):
        state = source.state_dict()
        del state[key]
        assert make(Extended).load_state_dict(state, strict=False).missing_keys == [key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            make(Extended).load_state_dict(state)


@pytest.mark.parametrize("nested", [False, True])
def test_row76_hooks_of_loading_run_before_the_layer_reads(nested):
    """A hook that renames the keys of an old format, on the layer and on what holds it."""
    source, layer = make(density=0.5), make(density=0.25)
    model, prefix = (nn.Sequential(layer), "0.") if nested else (layer, "")
    old = {"blocks": "values", "rows": "crow_indices", "cols": "col_indices"}
    state = {prefix + "bias": source.bias} | {prefix + k: source.state_dict()[v] for k, v in old.items()}
    seen = []

    def rename(module, state_dict, prefix, *_):
        for before, now in old.items():
            state_dict[prefix + now] = state_dict.pop(prefix + before)

    layer.register_load_state_dict_pre_hook(rename)
    layer.register_load_state_dict_post_hook(lambda module, keys: seen.append(module.pattern))
    model.load_state_dict(state)
    assert layer.pattern == source.pattern and torch.equal(layer.values, source.values) and seen == [source.pattern]


def test_row76_state_dict_hooks_of_others():
    source, target = make(density=0.5), make(density=0.25)
    source._register_state_dict_hook(
        lambda module, state, prefix, meta: state.update({prefix + "stamp": torch.ones(1)})
    )
    state = source.state_dict()
    assert target.load_state_dict(state, strict=False).unexpected_keys == ["stamp"]
    with pytest.raises(RuntimeError, match='Unexpected key.*"stamp"'):
        target.load_state_dict(state)


# --- strict and assign ---


def test_row76_strict_false_loads_what_is_there():
    source, layer = make(density=0.5), make(density=0.25)
    before = everything(layer)
    assert sorted(layer.load_state_dict({}, strict=False).missing_keys) == sorted(before)
    assert_holds(layer, before)
    keys = layer.load_state_dict({"bias": source.bias, "more": torch.ones(1)}, strict=False)
    assert sorted(keys.missing_keys) == ["col_indices", "crow_indices", "values"] and keys.unexpected_keys == ["more"]
    assert torch.equal(layer.bias, source.bias) and torch.equal(layer.values, before["values"])
    twin = SparseLinear(64, 48, pattern=source.pattern)
    keys = twin.load_state_dict(dict(source.named_parameters()), strict=False)  # values that fit the pattern
    assert sorted(keys.missing_keys) == ["col_indices", "crow_indices"] and torch.equal(twin.values, source.values)


@pytest.mark.parametrize("names", [["values"], ["crow_indices"], ["col_indices"], ["crow_indices", "col_indices"]])
def test_row76_part_of_another_pattern_is_refused(names):
    layer, state = make(density=0.25), make(density=0.5).state_dict()
    before, part = everything(layer), {name: state[name] for name in names}
    for model, prefix in ((layer, ""), (nn.Sequential(layer), "0.")):
        with pytest.raises(RuntimeError, match="must come together or fit the layer's pattern of 3 blocks, got "):
            model.load_state_dict({prefix + k: v for k, v in part.items()}, strict=False)
        assert_holds(layer, before)


def test_row76_assign_takes_the_tensors_themselves():
    source, target = make(Extended, 0.5), make(Extended, 0.25)
    target.values.requires_grad_(False)
    state = source.state_dict()
    assert target.load_state_dict(state, assign=True) == ([], [])
    assert target.values.data_ptr() == state["values"].data_ptr() and isinstance(target.values, nn.Parameter)
    assert target.bias.data_ptr() == state["bias"].data_ptr() and target.scale.data_ptr() == state["scale"].data_ptr()
    assert not target.values.requires_grad and target.bias.requires_grad
    x = torch.randn(3, 64)
    assert target.pattern == source.pattern and torch.equal(target(x), source(x))
    parameters = dict(source.named_parameters()) | {"crow_indices": state["crow_indices"]} | state
    parameters["values"] = nn.Parameter(state["values"].double())
    other = make(Extended, 0.25)
    other.load_state_dict(parameters, assign=True)
    assert other.values is parameters["values"] and other.values.dtype == torch.float64


def test_row76_assigned_values_are_zero_where_they_must_be():
    source, target = make_masked(0), make_masked(1)
    state = copy.deepcopy(source.state_dict())
    state["values"].fill_(1.0)
    target.load_state_dict(state, assign=True)
    assert torch.equal(target.values != 0, source.element_mask) and target.pattern == source.pattern
    uneven = SparseLinear(33, 47, density=1.0, block_size=16)
    uneven.load_state_dict(uneven.state_dict() | {"values": torch.ones_like(uneven.values)}, assign=True)
    assert uneven.values.sum() == 33 * 47


def test_row76_masks_come_with_the_state_and_are_missed():
    masked, plain = make_masked(0), make(density=0.25)
    assert plain.load_state_dict(masked.state_dict()) == ([], [])
    assert torch.equal(plain.element_mask, masked.element_mask) and torch.equal(plain.values, masked.values)
    state, other = make(density=0.25).state_dict(), make_masked(1)
    before = everything(other)
    with pytest.raises(RuntimeError, match='Missing key.*"element_mask"'):
        other.load_state_dict(state)
    assert_holds(other, before)
    assert other.load_state_dict(state, strict=False).missing_keys == ["element_mask"]
    assert other.element_mask is not None and not (other.values * ~other.element_mask).any()


# --- what does not fit ---


def test_row76_a_dense_checkpoint_says_what_to_do():
    dense = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 10))
    state = copy.deepcopy(dense.state_dict())
    model = sn.sparsify_(dense, 0.5, 16).model
    before = everything(model)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="0: SparseLinear: .* weight of a dense layer; load it before sparsify_"):
            model.load_state_dict(state, strict)
        assert_holds(model, before)
    with pytest.raises(RuntimeError, match="0: SparseLinear: .* load it before sparsify_"):
        nn.Sequential(make()).load_state_dict({"0.weight": torch.ones(48, 64), "0.bias": torch.ones(48)})


def test_row76_another_block_size_is_refused_naming_both():
    layer = make()
    before = everything(layer)
    other = SparseLinear(64, 48, density=0.5, block_size=8).state_dict()
    for model, prefix in ((layer, ""), (nn.Sequential(layer), "0.")):
        with pytest.raises(RuntimeError, match="layer's block size 16, got .* of block size 8"):
            model.load_state_dict({prefix + k: v for k, v in other.items()})
    assert_holds(layer, before)


def spoiled(state, layer, what):
    """A state in which one layer does not fit."""
    state = dict(state)
    if what == "missing":
        del state[f"{layer}.col_indices"]
    elif what == "unexpected":
        state[f"{layer}.more"] = torch.ones(1)
    elif what == "bias":
        state[f"{layer}.bias"] = torch.ones(3)
    else:
        state[f"{layer}.values"] = state[f"{layer}.values"][1:]
    return state


@pytest.mark.parametrize("what", ["missing", "unexpected", "bias", "values"])
@pytest.mark.parametrize("assign", [False, True])
def test_row76_a_failed_load_changes_nothing(what, assign):
    model = sn.SparseMLP([64, 48, 32], density=0.25, block_size=16)
    state = sn.SparseMLP([64, 48, 32], density=0.5, block_size=16).state_dict()
    before, patterns, parameters = everything(model), [layer.pattern for layer in model], list(model.parameters())
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        model.load_state_dict(spoiled(state, "1", what), assign=assign)
    assert_holds(model, before)
    assert all(a is b.pattern for a, b in zip(patterns, model, strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    layer = model[1]
    state = {k.removeprefix("1."): v for k, v in spoiled(state, "1", what).items() if k.startswith("1.")}
    with pytest.raises(RuntimeError):
        layer.load_state_dict(state, assign=assign)
    assert_holds(model, before)


def test_row76_a_layer_that_does_not_fit_stays_whole_in_any_model():
    """Torch loads module by module; the layer itself is taken as a whole or not at all, its bias included."""
    model = nn.Sequential(make(density=0.25), nn.ReLU())
    before = everything(model)
    state = nn.Sequential(make(density=0.5)).state_dict()
    for change in ({"0.values": state["0.values"][1:]}, {"0.bias": torch.ones(3)}):
        with pytest.raises(RuntimeError, match="0: SparseLinear: "):
            model.load_state_dict({**state, **change})
        assert_holds(model, before)


def test_row76_any_model_can_be_checked_before_it_loads():
    model = nn.Sequential(make(density=0.25), nn.Linear(48, 48), SparseLinear(48, 32, density=0.5, block_size=16))
    model.register_load_state_dict_pre_hook(sn.layers.refuse_unfit_state)
    other = nn.Sequential(make(density=0.5), nn.Linear(48, 48), SparseLinear(48, 32, density=0.25, block_size=16))
    before = everything(model)
    with pytest.raises(RuntimeError, match="nothing was loaded:\n\t2: SparseLinear: values must have one block"):
        model.load_state_dict(spoiled(other.state_dict(), "2", "values"))
    assert_holds(model, before)


# --- meta ---


MODELS = {
    "mlp": lambda: sn.SparseMLP([64, 48, 10], density=0.5, block_size=16),
    "mixed": lambda: nn.Sequential(make(), nn.LayerNorm(48), nn.Linear(48, 10)),
    "masked": lambda: nn.Sequential(make_masked(), nn.Linear(48, 10)),
}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_row77_a_model_on_meta_is_materialised(build):
    source, x = build(), torch.randn(5, 64)

    def on_meta():
        with torch.device("meta"):
            return build()

    def assert_is_source(model):
        assert not any(p.is_meta for p in model.parameters())
        assert torch.equal(model(x), source(x))
        layer = model[0]
        assert layer.pattern == source[0].pattern and layer.pattern.device.type == "cpu"
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=1)
        model(x).square().sum().backward()
        optimizer.step()
        assert sparsifier.step().grown
        if layer.element_mask is not None:
            assert not layer.element_mask.is_meta and not (layer.values * ~layer.element_mask).any()

    model = on_meta()
    model.load_state_dict(source.state_dict(), assign=True)
    assert_is_source(model)
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    assert_is_source(model)
    model = on_meta()
    with pytest.warns(UserWarning, match="0.values: copying from a non-meta parameter .* which is a no-op"):
        model.load_state_dict(source.state_dict())
    assert model[0].values.is_meta
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_is_source(model)


def test_row77_a_pattern_on_meta_survives_and_the_layer_starts_afresh():
    for layer in (make(device="meta"), make_masked().to("meta")):
        pattern, mask = layer.pattern, layer.element_mask
        layer.to_empty(device="cpu").reset_parameters()
        assert layer.pattern == pattern and not layer.values.is_meta and layer.values.any()
        assert mask is None or (torch.equal(layer.element_mask, mask) and not (layer.values * ~mask).any())
        x = torch.randn(3, 64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight_dense(), layer.bias))
    with pytest.raises(ValueError, match="element_mask must hold data, got a meta tensor"):
        SparseLinear(32, 32, density=1.0, block_size=16, element_mask=torch.ones(4, 16, 16, device="meta").bool())
    layer = nn.utils.skip_init(SparseLinear, 64, 48, density=0.5)
    layer.reset_parameters()
    assert layer(torch.randn(3, 64)).isfinite().all()


def test_row77_meta_tensors_are_no_values():
    layer = make(density=0.25)
    before = everything(layer)
    with pytest.raises(RuntimeError, match="values must hold data, got a meta tensor"):
        layer.load_state_dict(make(density=0.5, device="meta").state_dict())
    assert_holds(layer, before)
    with torch.device("meta"):
        dense = nn.Sequential(nn.Linear(64, 48))
    with pytest.raises(ValueError, match="weight of '0' must hold data, got a meta tensor; load the weights first"):
        sn.sparsify_(dense, 0.5, 16)
    assert type(dense[0]) is nn.Linear


def test_row77_sizes_that_do_not_fit_are_refused_on_meta():
    with torch.device("meta"):
        model = sn.SparseMLP([64, 48, 10], density=0.5, block_size=16)
    other = sn.SparseMLP([64, 32, 10], density=0.5, block_size=16).state_dict()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="nothing was loaded"):
        warnings.simplefilter("error")
        model.load_state_dict(other, assign=True)
    assert all(p.is_meta for p in model.parameters())
