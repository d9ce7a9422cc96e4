"""Element masks of a layer: kept as bits, exact zeros whatever is done to the values, and rules that are remembered."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import sparsenet as sn
from sparsenet import NM, BlockPattern, SparseLinear
from sparsenet.elements import largest_elements
from sparsenet.functional.bits import mask_bytes, pack_mask, unpack_mask
from sparsenet.topology import Topology

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam without eps": lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0),  # divides zero by zero where the mask is off
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


class ByHand:
    """No optimizer of torch's: momentum and weight decay in a loop."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            buffer.mul_(0.9).add_(p.grad + 0.1 * p)
            p.sub_(0.1 * buffer)


def make(mask=0.4, block_size=8, seed=0, shape=(47, 70), **options):
    generator = torch.Generator().manual_seed(seed)
    pattern = BlockPattern.random(shape, 0.6, block_size, generator)
    return SparseLinear(shape[1], shape[0], pattern=pattern, element_mask=mask, generator=generator, **options)


def backward(layer, scale=1.0):
    layer.values.grad = None
    layer(torch.randn(9, layer.in_features, dtype=layer.values.dtype)).square().mean().mul(scale).backward()


def exact(tensor, mask):
    """No element is anything but +0 where the mask is off, and some are where it is on."""
    bits = tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return not bits[~mask].any() and bool(tensor[mask].any())


# --- exact zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "by hand"])
def test_zeros_are_exact_after_every_step(name, block_size):
    layer = make(block_size=block_size)
    mask = layer.element_mask
    optimizer = ByHand(layer.parameters()) if name == "by hand" else OPTIMIZERS[name](layer.parameters())
    before = layer.values.detach().clone()
    for _ in range(3):
        backward(layer)
        assert exact(layer.values.grad, mask)
        optimizer.step()
        assert exact(layer.values, mask)
    assert (layer.values != before)[mask].any()


WRITES = {
    "data.normal_": lambda layer: layer.values.data.normal_(),
    "no_grad": lambda layer: nn.init.ones_(layer.values),
    "vector": lambda layer: nn.utils.vector_to_parameters(torch.ones(99999), layer.parameters()),
    "numpy": lambda layer: layer.values.detach().numpy().fill(1.0),
    "nan": lambda layer: layer.values.data.masked_fill_(~layer.element_mask, torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_values_written_by_hand_never_pass_the_mask(name):
    layer, x = make(), torch.randn(9, 70, requires_grad=True)
    mask = layer.element_mask
    WRITES[name](layer)
    weight = layer.weight_dense().detach().requires_grad_()
    assert weight.isfinite().all() and int(weight.count_nonzero()) == layer.num_active
    expected = nn.functional.linear(x, weight, layer.bias)
    for y in (
        layer(x),
        torch.compile(layer, backend="eager")(x),
        torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)),
    ):
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.square().sum(), (x, layer.values))
        (of_x,) = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
        torch.testing.assert_close(gradients[0], of_x)
        assert exact(gradients[1], mask)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    backward(layer)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert exact(layer.values, mask)


def test_gradients_are_zero_where_inputs_are_infinite():
    layer = make()
    x = torch.randn(9, 70)
    x[0, 3] = torch.inf
    layer(x).sum().backward()
    assert exact(layer.values.grad, layer.element_mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer = make(dtype=dtype)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    backward(layer)
    optimizer.step()
    assert exact(layer.values, layer.element_mask) and exact(layer.values.grad, layer.element_mask)


def test_autocast_masks_as_well():
    layer = make()
    layer.values.data.fill_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.ones(2, 70))
    expected = nn.functional.linear(torch.ones(2, 70), layer.weight_dense(), layer.bias)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.02)
    y.float().sum().backward()
    assert exact(layer.values.grad, layer.element_mask)


def test_training_is_that_of_a_dense_masked_network():
    """In float64: clipped gradients, moments and weight decay see a truly sparse network."""
    layer = make(dtype=torch.float64)
    dense = nn.Linear(70, 47, dtype=torch.float64)
    dense.weight.data, dense.bias.data = layer.weight_dense().detach().clone(), layer.bias.detach().clone()
    twin = SparseLinear(70, 47, pattern=layer.pattern, dtype=torch.float64)
    twin.values.data = layer.element_mask.double()
    mask = twin.weight_dense().detach()
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (layer, dense))
    for _ in range(5):
        x = torch.randn(9, 70, dtype=torch.float64)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        layer(x).square().mean().backward()
        nn.functional.linear(x, dense.weight * mask, dense.bias).square().mean().backward()
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (layer, dense)]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
        assert norms[0] > 0.01
        ours.step()
        theirs.step()
        torch.testing.assert_close(layer.weight_dense(), dense.weight.detach(), rtol=1e-10, atol=1e-12)
    state = ours.state[layer.values]
    assert exact(state["exp_avg"], layer.element_mask) and exact(state["exp_avg_sq"], layer.element_mask)


def test_another_optimizers_step_leaves_a_graph_alone():
    """A GAN's: both networks run forward, one is stepped, then the other runs backward."""
    layer, other = make(), nn.Linear(2, 2)
    loss = layer(torch.randn(3, 70)).sum()
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    loss.backward()
    assert exact(layer.values.grad, layer.element_mask)


def test_a_forward_keeps_no_copy_of_the_values():
    layer, kept = make(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 70))
    mine = layer.values.untyped_storage().data_ptr()
    others = [t for t in kept if t.untyped_storage().data_ptr() != mine]
    assert len(others) < len(kept) and all(t.numel() <= 3 * 70 for t in others)


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32])
def test_the_mask_takes_a_bit_per_element(block_size):
    layer = make(block_size=block_size)
    bits = layer.topology.mask_bits
    assert bits.dtype == torch.uint8 and bits.nbytes == layer.pattern.num_blocks * mask_bytes(block_size)
    assert layer.element_mask is not layer.element_mask and torch.equal(
        unpack_mask(bits, block_size), layer.element_mask
    )
    layer.element_mask.fill_(True)  # a fresh tensor
    assert torch.equal(layer.topology.mask_bits, bits) and layer.num_active < layer.values.numel()


def test_the_constructor_counts_exactly():
    plain = make(None)
    for share in (0.01, 0.3, 0.5, 0.99):
        assert make(share).num_active == round(share * plain.num_active)
    assert torch.equal(make(0.3).element_mask, make(0.3).element_mask), "by the generator"
    assert not torch.equal(make(0.3).element_mask, make(0.3, seed=1).element_mask)
    assert make(0.3).elements is None and make(None).elements is None and make(None).element_mask is None


@pytest.mark.parametrize("rule", ["2:4", "1:4", "4:8", "1:2"])
def test_the_constructor_follows_a_rule(rule):
    layer = make(rule, shape=(48, 72))
    assert str(layer.elements) == rule and layer.elements.holds(layer.element_mask)
    n, m = layer.elements.n, layer.elements.m
    assert layer.num_active == layer.values.numel() * n // m
    bound = (3 / layer.active_fan_in().clamp(min=1)).sqrt().max()
    assert layer.values.abs().max() <= bound and exact(layer.values, layer.element_mask)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("3:5", "m must divide the block size 8, got 5"),
        ("2:16", "block size 8, got 16"),
        ("half", "rule must read n:m"),
    ],
)
def test_rules_that_do_not_fit_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        make(asked)
    layer = make()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        layer.set_element_mask(asked)
    assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())


def test_a_mask_is_set_by_magnitude():
    layer = make(None)
    values = layer.values.detach().clone()
    backward(layer)
    loss = layer(torch.randn(3, 70)).sum()
    layer.set_element_mask("2:4")
    assert layer.elements == NM(2, 4) and layer.values.grad is None
    mask = NM(2, 4).mask(values, layer.pattern)
    assert torch.equal(layer.element_mask, mask) and torch.equal(layer.values, torch.where(mask, values, 0))
    with pytest.raises(sn.functional.StaleTopologyError):
        loss.backward()
    layer.set_element_mask(0.25)
    count = round(0.25 * make(None).num_active)
    assert layer.elements is None and layer.num_active == count
    assert torch.equal(layer.element_mask, largest_elements(torch.where(mask, values, 0), layer.pattern, count))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    backward(layer)
    optimizer.step()
    assert exact(layer.values, layer.element_mask), "a layer that was made without a mask is mended as well"
    mask = layer.element_mask
    layer.set_element_mask(None)
    assert layer.element_mask is None and layer.elements is None and exact(layer.values, mask)
    backward(layer)
    optimizer.step()
    assert layer.values[~mask].any(), "they are trained again"


def test_values_written_where_the_mask_is_off_do_not_come_back():
    layer = make("2:4")
    values, mask = layer.values.detach().clone(), layer.element_mask
    layer.values.data[~mask] = 9.0
    twin = copy.deepcopy(layer)
    layer.set_element_mask(None)
    assert torch.equal(layer.values, values)
    twin.set_element_mask("2:4")
    assert torch.equal(twin.values, values) and torch.equal(twin.element_mask[mask], mask[mask])
    with pytest.raises(ValueError, match="values must hold data for a mask by magnitude, got a meta tensor"):
        layer.to("meta").set_element_mask("2:4")


def test_values_that_something_computes_keep_their_mask():
    layer = make()
    torch.nn.utils.prune.random_unstructured(layer, "values", 0.2)
    layer.values_orig.data.fill_(1.0)
    x = torch.randn(3, 70)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight_dense(), layer.bias))
    layer(x).sum().backward()
    assert exact(layer.values_orig.grad, layer.element_mask)
    with pytest.raises(RuntimeError, match="values must be a Parameter for the pattern to change"):
        layer.set_element_mask("2:4")


# --- rewires --------------------------------------------------------------------------------------------------------


def test_new_blocks_follow_the_rule():
    """They were whole once: 1,024 masked weights became 1,280."""
    layer = SparseLinear(64, 64, pattern=BlockPattern.random((64, 64), 0.5, 16), element_mask="2:4")
    assert layer.num_active == 1024
    old, pattern = layer.element_mask, BlockPattern.random((64, 64), 0.5, 16)
    values = torch.randn(8, 16, 16)
    carried = layer.set_pattern(pattern, values)
    assert layer.num_active == 1024 and layer.elements == NM(2, 4) and layer.elements.holds(layer.element_mask)
    new = carried < 0
    assert new.any() and not new.all()
    assert torch.equal(layer.element_mask[new], NM(2, 4).mask(values, pattern)[new])
    assert torch.equal(layer.element_mask[~new], old[carried[~new]])
    fewer = layer.pattern.linear_places()[:5]
    layer.values.data[:5].fill_(torch.nan)  # nobody has to rank them
    layer.set_pattern(BlockPattern.from_linear_places(fewer, (64, 64), 16))
    assert layer.num_active == 5 * 128
    layer.values.data.fill_(1.0)
    layer.set_pattern(BlockPattern.random((64, 64), 0.75, 16))
    assert layer.num_active == 12 * 128 and layer.elements.holds(layer.element_mask)


def test_a_mask_that_breaks_the_rule_is_refused():
    layer = make("2:4")
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match="element_mask must keep the layer's rule 2:4, got another"):
        layer.set_pattern(layer.pattern, element_mask=torch.ones_like(layer.values, dtype=torch.bool))
    assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())
    mask = NM(1, 4).mask(layer.values, layer.pattern)
    layer.set_pattern(layer.pattern, element_mask=mask)
    assert torch.equal(layer.element_mask, mask) and layer.elements == NM(2, 4)


def test_unstructured_masks_grow_whole_blocks():
    layer = make(0.4, shape=(48, 72))
    active, blocks = layer.num_active, layer.pattern.num_blocks
    everything = BlockPattern.random((48, 72), 1.0, 8)
    layer.set_pattern(everything)
    assert layer.num_active == active + 64 * (everything.num_blocks - blocks) and layer.elements is None


# --- copies and states ----------------------------------------------------------------------------------------------


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("asked", [0.4, "1:2", "2:4", None, "by chance"])
def test_masks_and_rules_survive(asked, block_size, tmp_path):
    if isinstance(asked, str) and block_size == 1:
        pytest.skip("one weight is no group")
    source = make("2:4" if asked == "by chance" else asked, block_size)
    if asked == "by chance":  # every group has two, and yet nobody asked for that
        source.set_element_mask(source.element_mask)
    rule = NM.parse(asked) if isinstance(asked, str) and asked != "by chance" else None
    sn.save(tmp_path / "a.safetensors", nn.Sequential(source))
    file_twin = nn.Sequential(make(0.7 if asked else None, block_size, seed=1))
    sn.load(tmp_path / "a.safetensors", file_twin)
    state = through_a_file(source)
    assert ("element_rule" in state) == (rule is not None) and ("element_mask" in state) == (asked is not None)
    loaded, assigned = (make("1:2" if asked and block_size > 1 else asked, block_size, seed=1) for _ in range(2))
    assert loaded.load_state_dict(state) == ([], [])
    assigned.load_state_dict(state, assign=True)
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), loaded, assigned, file_twin[0]):
        assert twin.elements == rule and twin.pattern == source.pattern and torch.equal(twin.values, source.values)
        if asked is None:
            assert twin.element_mask is None
            continue
        assert torch.equal(twin.element_mask, source.element_mask)
        assert twin.topology.mask_bits is not source.topology.mask_bits
        backward(twin)
        torch.optim.Adam(twin.parameters(), eps=0.0).step()
        assert exact(twin.values, twin.element_mask)


def test_states_from_before_masks_were_packed_load(tmp_path):
    source, target = make("2:4"), make("1:4", seed=1)
    state = source.state_dict()
    state["element_mask"] = source.element_mask
    del state["element_rule"]
    target.load_state_dict(state)
    assert torch.equal(target.element_mask, source.element_mask) and target.elements is None
    partial = make("2:4")
    partial.load_state_dict({"bias": torch.ones(47), "element_mask": partial.element_mask}, strict=False)
    assert partial.bias.eq(1).all() and partial.elements == NM(2, 4)


def test_pickles_from_before_masks_were_packed_load():
    source = make(0.4)
    topology = Topology(source.pattern, source.element_mask, "a layer")  # what such a pickle calls
    assert torch.equal(topology.mask_bits, source.topology.mask_bits) and topology.elements is None


def test_files_from_before_masks_were_packed_load(tmp_path, monkeypatch):
    source, target, meta = (
        nn.Sequential(make(0.4, seed=s, device=d)) for s, d in ((0, "cpu"), (1, "cpu"), (2, "meta"))
    )
    save = SparseLinear._save_to_state_dict

    def old(self, destination, prefix, keep_vars):
        save(self, destination, prefix, keep_vars)
        destination[prefix + "element_mask"] = self.element_mask

    with monkeypatch.context() as before:
        before.setattr(SparseLinear, "_save_to_state_dict", old)
        sn.save(tmp_path / "old.safetensors", source)
    for model in (target, meta):
        sn.load(tmp_path / "old.safetensors", model)
        assert torch.equal(model[0].element_mask, source[0].element_mask) and torch.equal(
            model[0].values, source[0].values
        )


SPOILED = {
    "short": (lambda s: s.update(element_mask=s["element_mask"][:, :-1]), "element_mask must be packed in uint8"),
    "few": (lambda s: s.update(element_mask=s["element_mask"][1:]), r"element_mask must be packed in uint8 \[\d+, 8\]"),
    "flat": (lambda s: s.update(element_mask=s["element_mask"].flatten()), "element_mask must be packed in uint8"),
    "signed": (lambda s: s.update(element_mask=s["element_mask"].to(torch.int8)), "element_mask must be bool"),
    "floats": (lambda s: s.update(element_mask=s["element_mask"].float()), "element_mask must be bool"),
    "unruly": (lambda s: s["element_mask"].fill_(255), "element_mask must keep its element_rule 2:4"),
    "no rule": (lambda s: s.update(element_rule=torch.tensor([4, 2], dtype=torch.uint8)), "n must lie in"),
    "zero": (lambda s: s["element_rule"].zero_(), "NM: n must be an integer >= 1, got 0"),
    "sixteen": (lambda s: s.update(element_rule=torch.tensor([2, 16], dtype=torch.uint8)), "block size 8, got 16"),
    "three": (lambda s: s.update(element_rule=torch.tensor([2, 4, 8], dtype=torch.uint8)), "element_rule must be n, m"),
    "int64": (lambda s: s.update(element_rule=s["element_rule"].long()), r"element_rule must be n, m in uint8 \[2\]"),
    "rule alone": (lambda s: s.pop("element_mask"), "element_rule must come with an element_mask, got 2:4 alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_hostile_masks_are_refused_and_nothing_changes(name, tmp_path):
    spoil, message = SPOILED[name]
    model = nn.Sequential(nn.Linear(70, 70), make("1:4", seed=1))
    before = copy.deepcopy(model.state_dict())
    source = make("2:4")
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    whole = {**model.state_dict(), "0.bias": torch.ones(70)}
    del whole["1.element_mask"], whole["1.element_rule"]
    whole |= {f"1.{key}": tensor for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=message):
        model[1].load_state_dict(state)

    class Spoiled(nn.Module):
        def state_dict(self, *args, **kwargs):
            return whole

    sn.save(tmp_path / "a.safetensors", Spoiled())
    for strict in (True, False):
        said = "missing in the file" if strict and name == "rule alone" else message
        with pytest.raises(ValueError, match=said):
            sn.load(tmp_path / "a.safetensors", model, strict=strict)
    assert model[1].elements == NM(1, 4)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_bits_outside_the_matrix_are_cleared():
    source, target = make(0.4, block_size=32), make(0.4, block_size=32, seed=1)
    state = source.state_dict()
    state["element_mask"] = torch.full_like(state["element_mask"], 255)
    target.load_state_dict(state)
    assert target.num_active == make(None, block_size=32).num_active < target.values.numel()
    assert torch.equal(target.topology.mask_bits, pack_mask(target.element_mask))


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_plans_count_bits():
    from sparsenet.memory import step_bytes

    masked, plain = (nn.Sequential(make(asked, block_size=16)) for asked in (0.4, None))
    bytes_of = {}
    for model in (masked, plain):
        items = step_bytes(model, torch.optim.AdamW(model.parameters()), torch.randn(8, 70)).items
        bytes_of[model] = items
    blocks, values = masked[0].pattern.num_blocks, masked[0].values
    assert bytes_of[masked]["indices"] - bytes_of[plain]["indices"] == blocks * 32
    assert bytes_of[masked]["activations"] == bytes_of[plain]["activations"]
    assert bytes_of[masked]["workspace"] - bytes_of[plain]["workspace"] == values.nbytes + values.numel()


def test_the_mask_of_one_model_is_no_cost_of_anothers_step():
    """Every step of any optimizer mends every masked layer, also the step that is made to count its memory."""
    from sparsenet.memory import step_bytes

    model = nn.Linear(4, 4)
    optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(2, 4)
    alone = step_bytes(model, optimizer, x)
    other = make(0.4, block_size=16, shape=(256, 256))
    assert step_bytes(model, optimizer, x).moments == alone.moments and other.num_active
