"""What a policy remembers of every block: it goes where its block goes, also into a saved state."""

import torch

import sparsenet as sn


class Placing(sn.SET):
    """Remembers at which place each block was when it was first seen, plus 1; 0 of blocks that came later."""

    every_step = True

    def after_step(self, layer):
        if "place" not in layer.state:
            layer.state["place"] = layer.pattern.linear_places() + 1


def test_a_state_saved_right_after_a_rewire_is_that_of_the_blocks_as_they_are_now():
    model = sn.SparseMLP([32, 32], 0.5, 8)
    sparsifier = sn.Sparsifier(model, None, Placing(0.5), every=2)
    update = [sparsifier.step() for _ in range(2)][-1].layers["0"]
    places = model[0].pattern.linear_places()
    expected = torch.where(torch.isin(places, update.grown_places), 0, places + 1)
    assert update.grown > 0
    assert torch.equal(sparsifier.state_dict()["policy"]["0"]["place"], expected)


def test_a_state_saved_after_the_density_fell_can_be_loaded():
    model = sn.SparseMLP([32, 32], 0.5, 8)
    sparsifier = sn.Sparsifier(model, None, Placing(0.25), density=sn.Linear(0.5, 0.25, 2), every=2)
    assert [sparsifier.step() for _ in range(2)][-1].dropped > 0
    state = sparsifier.state_dict()
    other = sn.Sparsifier(model, None, Placing(0.25), density=sn.Linear(0.5, 0.25, 2), every=2)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["policy"]["0"]["place"], state["policy"]["0"]["place"])
