"""Signatures: what is stored estimates the paper's similarity, for each KV slot."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rksc_sglang.asks.signature import DIMENSIONS, Signatures, UnsupportedModel, layer_weights

LAYERS, WIDTH = 12, 256


class Layer(nn.Module):
    """As SGLang's decoder layers: shows the residual stream that enters it, to who asks."""

    def forward(self, positions, hidden_states, forward_batch, capture_output=None):
        if capture_output is not None:
            capture_output(hidden_states)
        return hidden_states + forward_batch.updates.pop(0)


class Model(nn.Module):
    def __init__(self, layer=Layer):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, updates, slots, capture_output=None):
        """``updates`` [LAYERS, tokens, WIDTH]; gives the streams that entered each layer."""
        batch = SimpleNamespace(updates=list(updates), out_cache_loc=torch.tensor(slots))
        hidden, streams = torch.zeros(updates.shape[1:]), []
        for layer in self.model.layers:
            streams.append(hidden)
            hidden = layer(None, hidden, batch, capture_output=capture_output)
        return torch.stack(streams)


@pytest.fixture
def model():
    return Model()


def test_similarity_is_the_papers_weighted_cosine(model):
    torch.manual_seed(0)
    signatures = Signatures(model, WIDTH, 100, "cpu")
    base = torch.randn(LAYERS, 1, WIDTH)
    updates = torch.cat([base + noise * torch.randn_like(base) for noise in (0, 0.2, 0.6, 3)], 1)
    streams = model(updates, [7, 20, 33, 60])
    found = signatures.similarity([7], [[7], [20], [33], [60]])
    weights = layer_weights(signatures.layers, LAYERS)
    for other, value in enumerate(found):
        cosines = torch.cosine_similarity(streams[:, 0], streams[:, other], dim=1)
        assert value == pytest.approx(float(weights @ cosines[signatures.layers]), abs=0.08)
    assert found[0] == pytest.approx(1, abs=0.01)
    assert found == sorted(found, reverse=True)


def test_what_was_not_recorded_is_unknown(model):
    signatures = Signatures(model, WIDTH, 100, "cpu")
    model(torch.randn(LAYERS, 2, WIDTH), [1, 2])
    assert signatures.similarity([1], [[2], [3]])[1] is None
    assert signatures.similarity([3], [[1], [2]]) == [None, None]


def test_a_slot_that_is_used_again_gets_a_new_signature(model):
    signatures = Signatures(model, WIDTH, 100, "cpu")
    model(torch.randn(LAYERS, 1, WIDTH), [5])
    before = signatures.rows[5].clone()
    model(torch.randn(LAYERS, 1, WIDTH), [5])
    assert not torch.equal(signatures.rows[5], before)


def test_later_layers_weigh_more():
    weights = layer_weights([0, 6, 12], 12)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[2] / weights[0]) == pytest.approx(4.4817, rel=1e-3)  # exp(1.5)


def test_bytes_a_slot_are_bounded(model):
    signatures = Signatures(model, WIDTH, 100, "cpu")
    assert signatures.bytes_per_slot == len(signatures.layers) * DIMENSIONS * 2 <= 512


def test_others_that_ask_for_the_stream_still_get_it(model):
    Signatures(model, WIDTH, 100, "cpu")
    seen = []
    model(torch.randn(LAYERS, 1, WIDTH), [1], lambda value, owned=False: seen.append(value))
    assert len(seen) == LAYERS


def test_a_model_that_does_not_show_its_stream_is_refused():
    class Closed(nn.Module):
        def forward(self, positions, hidden_states, forward_batch):
            return hidden_states

    with pytest.raises(UnsupportedModel, match="Closed does not show"):
        Signatures(Model(Closed), WIDTH, 100, "cpu")
    with pytest.raises(UnsupportedModel, match="no list of decoder layers"):
        Signatures(nn.Linear(2, 2), WIDTH, 100, "cpu")


def test_the_similarity_of_several_tokens_is_their_mean(model):
    torch.manual_seed(1)
    signatures = Signatures(model, WIDTH, 100, "cpu")
    model(torch.randn(LAYERS, 4, WIDTH), [1, 2, 3, 4])
    (first,) = signatures.similarity([1], [[3]])
    (second,) = signatures.similarity([2], [[4]])
    assert signatures.similarity([1, 2], [[3, 4]]) == pytest.approx([(first + second) / 2])
    assert signatures.similarity([1, 2], [[3, 50]]) == [None]
