"""What is attached to a layer, and where else a model holds it: told, and nothing is changed."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import w8a8
from tests.conftest import relative_error
from w8a8.layers.linear import QuantLinear
from w8a8.model.selection import select
from w8a8.model.swapping import swapped


def normed():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(16, 16))


def own_forward():
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


def hooked():
    layer = nn.Linear(16, 16)
    layer.register_full_backward_hook(lambda *_: None)
    return layer


def hooked_when_it_is_saved():
    layer = nn.Linear(16, 16)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def hooked_when_it_is_loaded():
    layer = nn.Linear(16, 16)
    layer.register_load_state_dict_pre_hook(lambda *_: None)
    return layer


def with_parameter():
    layer = nn.Linear(16, 16)
    layer.register_buffer("shift", torch.ones(16))
    return layer


ATTACHED = {
    "weight_norm of old": (normed, "its weight is made of weight_g, weight_v at each call"),
    "spectral_norm of old": (
        lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
        "its weight is made of weight_orig, weight_u, weight_v at each call",
    ),
    "prune": (
        lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5),
        "its weight is made of weight_mask, weight_orig at each call; torch.nn.utils.prune.remove",
    ),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), r"made anew at each call (_WeightNorm)"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 16)), "(_SpectralNorm)"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), "(_Orthogonal)"),
    "an instance's forward": (own_forward, "it has a forward of its own, set on it"),
    "a hook": (hooked, "it has hooks"),
    "a hook of its state dict": (hooked_when_it_is_saved, "it has hooks"),
    "a hook of loading": (hooked_when_it_is_loaded, "it has hooks"),
    "a buffer": (with_parameter, "it also has shift, which a swap would drop"),
}


@pytest.mark.parametrize("kind", ATTACHED)
def test_a_layer_with_something_attached_stays_float_and_computes_what_it_did(kind):
    make, message = ATTACHED[kind]
    attached = make()
    model = nn.Sequential(nn.Linear(16, 16), attached).eval()
    x = torch.randn(3, 16)
    result = w8a8.quantize(model)
    assert model[1] is attached
    (left,) = (m for m in result.coverage.left if m.name == "1")
    assert message in left.reason
    assert left.shape == (16, 16)
    assert left.macs == 256
    with torch.no_grad():
        assert torch.equal(model(x), attached(model[0](x)))


@pytest.mark.parametrize("kind", ATTACHED)
def test_where_nothing_else_is_there_the_model_is_as_it_was(kind):
    model = nn.Sequential(ATTACHED[kind][0]())
    layer, state = model[0], {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(w8a8.errors.SchemeError, match="nothing to quantise"):
        w8a8.quantize(model)
    assert model[0] is layer
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Listed(nn.Module):
    """Goes through a plain container, not through its children."""

    def __init__(self, hold):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.held = hold(self.first, self.second)

    def forward(self, x):
        for layer in self.held.values() if isinstance(self.held, dict) else self.held:
            x = layer(x)
        return x


class Chain:
    """No module, and holds two."""

    def __init__(self, *layers):
        self.first, self.second = layers

    def __iter__(self):
        return iter((self.first, self.second))


@pytest.mark.parametrize(
    "hold",
    [
        lambda *layers: list(layers),
        lambda *layers: dict(enumerate(layers)),
        Chain,
        lambda *layers: [layers[0], nn.Sequential(layers[1])],
        lambda *layers: ([layers[0]], [layers[1]])[0] + [layers[1]],
    ],
    ids=["list", "dict", "object", "a module that is no child", "lists"],
)
def test_a_swap_reaches_whatever_holds_a_layer(hold):
    model = Listed(hold)
    float_layers = model.first, model.second
    x = torch.randn(3, 16)
    exact = model(x).detach()
    assert select(model).chosen == ("first", "second")
    new = {name: QuantLinear.from_float(getattr(model, name)) for name in ("first", "second")}
    with swapped(model, new):
        assert torch.equal(model(x), new["second"](new["first"](x)))
    assert (model.first, model.second) == float_layers
    assert torch.equal(model(x).detach(), exact)
    w8a8.quantize(model)
    assert 0 < relative_error(model(x), exact) < 0.05
    assert torch.equal(model(x), model.second(model.first(x)))


@pytest.mark.parametrize(
    ("hold", "where"),
    [
        (lambda *layers: tuple(layers), "held (a tuple)"),
        (lambda *layers: [layer.forward for layer in layers], "held[0] (a bound method)"),
        (lambda *layers: [functools.partial(layer) for layer in layers], "held[0] (a partial)"),
        (lambda *layers: [lambda x, layer=layer: layer(x) for layer in layers] and [lambda x: layers[0](x)], "closure"),
    ],
    ids=["tuple", "bound method", "partial", "closure"],
)
def test_a_layer_that_is_held_where_no_swap_reaches_stays_float(hold, where):
    model = nn.Sequential(Listed(hold), nn.Linear(16, 16))
    x = torch.randn(3, 16)
    exact = model[0](x)
    found = w8a8.quantize(model)
    assert [m.name for m in found.coverage.quantized] == ["1"]
    assert torch.equal(model[0](x), exact)
    (reason,) = {m.reason for m in found.coverage.left if m.name == "0.first"}
    assert where in reason
    assert "too, where no other can be put in its place" in reason
