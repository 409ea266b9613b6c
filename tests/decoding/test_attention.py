"""Attention over an `Int8Cache`: the kernel, beside plain PyTorch on what the cache holds."""

import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from tests.conftest import needs
from tests.decoding.models import VOCAB, causal
from w8a8.decoding import attention as here
from w8a8.decoding.attention import ROWS, attention
from w8a8.decoding.layers import Int8Layer, SlidingInt8Layer
from w8a8.errors import ModelError

pytestmark = [pytest.mark.kernels, needs("native")]

MODULE = types.SimpleNamespace(is_causal=True, num_key_value_groups=3)
HEADS, SHARED, DIMS = 2, 3, 16


def states(tokens, batch=2):
    return torch.randn(batch, HEADS, tokens, DIMS), torch.randn(batch, HEADS, tokens, DIMS)


def queries(tokens, batch=2):
    return 2 * torch.randn(batch, HEADS * SHARED, tokens, DIMS)


def filled(layer, tokens=40):
    """A layer whose keys and values came to attention as it gave them."""
    keys, values = layer.update(*states(tokens))
    attention(MODULE, queries(tokens), keys, values, None)
    return layer


def by_floats(q, keys, values, mask=None, *, softcap=None, sinks=None):
    """The textbook's, in float64."""
    q, keys, values = (x.double() for x in (q, keys, values))
    keys, values = (x.repeat_interleave(SHARED, 1) for x in (keys, values))
    scores = q @ keys.transpose(-1, -2) / DIMS**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values).transpose(1, 2)


@pytest.fixture
def asked_of_kernel(monkeypatch):
    """How often the kernel answered."""
    answers = []

    def seen(*operands):
        answers.append(kernel(*operands))
        return answers[-1]

    kernel = here.attend
    monkeypatch.setattr(here, "attend", seen)
    return answers


@pytest.mark.parametrize("tokens", [1, 5, ROWS])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("more", [{}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 2, HEADS * SHARED)}])
def test_codes_are_attended_as_plain_pytorch_attends_to_what_they_stand_for(asked_of_kernel, tokens, masked, more):
    """Within 2e-4 of the largest value: rounding queries to 16 bits moves a score by 1e-4 here, the sums by less."""
    layer = filled(Int8Layer())
    q, given = queries(tokens), layer.update(*states(tokens))
    assert all(x.isnan().all() for x in given)
    mask = torch.ones(2, 1, tokens, 40 + tokens, dtype=torch.bool).tril(40) if masked or tokens > 1 else None
    if masked:
        mask[0, :, :, :7] = False
    how = {"softcap": more.get("softcap"), "s_aux": more.get("sinks")}
    found, weights = attention(MODULE, q, *given, mask, **how)
    wanted = by_floats(q, layer.keys, layer.values, mask, **more)
    assert weights is None
    assert len(asked_of_kernel) == 1
    assert asked_of_kernel[0] is found
    assert (found - wanted).abs().max() <= 2e-4 * layer.values.abs().max()


@pytest.mark.parametrize("mask", ["seen", "added", "by head"])
def test_a_token_over_floats_is_plain_pytorch_with_the_keys_that_heads_share_where_they_are(monkeypatch, mask):
    """As a graph of torch.compile has it too: transformers' own writes them out there for each head."""
    (keys, values), q = states(40), queries(1)
    seen = torch.rand(2, 1, 1, 40) > 0.3
    given = {"seen": seen, "added": seen.float().log(), "by head": torch.randn(2, HEADS * SHARED, 1, 40)}[mask]
    shapes = []

    def product(q, k, v, **how):
        shapes.append((q.shape[1], k.shape[1]))
        return plain(q, k, v, **how)

    plain = here.F.scaled_dot_product_attention
    monkeypatch.setattr(here.F, "scaled_dot_product_attention", product)
    found, _ = attention(MODULE, q, keys, values, given)
    wanted = by_floats(q, keys, values, given)
    assert shapes == [(HEADS, HEADS)]
    assert (found - wanted).abs().max() <= 4e-6 * values.abs().max()


def test_a_window_is_what_the_layer_gives(asked_of_kernel):
    layer = filled(SlidingInt8Layer(7))
    for _ in range(20):
        q, given = queries(1), layer.update(*states(1))
        found, _ = attention(MODULE, q, *given, None)
        seen = layer.store.keys(layer.end - 7, layer.end), layer.store.values(layer.end - 7, layer.end)
        assert given[0].shape[2] == 7
        assert (found - by_floats(q, *seen)).abs().max() <= 2e-4 * seen[1].abs().max()
    assert len(asked_of_kernel) == 20


def test_positions_are_added_to_a_mask_of_either_kind():
    layer, bias = filled(Int8Layer()), torch.randn(1, HEADS * SHARED, 1, 42)
    for extra in (None, torch.rand(2, 1, 1, 42) > 0.2, torch.randn(2, 1, 1, 42)):
        if layer.end == 42:
            layer.crop(-1)
        q, given = queries(1), layer.update(*states(42 - layer.end))
        found, _ = attention(MODULE, q, *given, extra, position_bias=bias)
        mask = bias if extra is None else bias + (extra.float().log() if extra.dtype == torch.bool else extra)
        assert (found - by_floats(q, layer.keys, layer.values, mask)).abs().max() <= 3e-4 * layer.values.abs().max()


def test_many_queries_are_given_floats(asked_of_kernel):
    layer = filled(Int8Layer())
    q, given = queries(ROWS + 1), layer.update(*states(ROWS + 1))
    mask = torch.ones(1, 1, ROWS + 1, 41 + ROWS, dtype=torch.bool).tril(40)
    found, _ = attention(MODULE, q, *given, mask)
    assert not asked_of_kernel
    torch.testing.assert_close(found, by_floats(q, layer.keys, layer.values, mask).float())


@pytest.mark.parametrize("masked", [False, True])
def test_a_soft_cap_and_sinks_over_floats_are_plain_pytorch(masked):
    tokens = 2 * here._PIECE + 9
    q, (keys, values) = queries(tokens), states(tokens)
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    sinks = torch.randn(HEADS * SHARED)
    found, _ = attention(MODULE, q, keys, values, seen if masked else None, softcap=2.0, s_aux=sinks)
    wanted = by_floats(q, keys, values, seen, softcap=2.0, sinks=sinks).float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_who_sees_it_and_nobody_else(odd):
    """With a soft cap or sinks it was taken for zero as soon as any token saw any other not."""
    q, (keys, values) = queries(6), states(6)
    values[:, :, 3] = odd
    found, _ = attention(MODULE, q, keys, values, None, softcap=2.0)
    assert found.isfinite().all(-1).all(-1).all(0).tolist() == [True] * 3 + [False] * 3
    assert found[:, :3].isfinite().all()
    layer = filled(Int8Layer(), 6)
    given = layer.update(keys[:, :, 3:4], values[:, :, 3:4])
    assert attention(MODULE, q[:, :, :1], *given, None)[0].isnan().all()  # the kernel too


def test_a_model_that_changes_what_it_is_given_is_given_floats():
    layer = Int8Layer()
    for tokens in (9, 1, 1):
        keys, values = layer.update(*states(tokens))
        assert keys.isfinite().all()
        attention(MODULE, queries(tokens), keys * 1.0, values, None)
    assert not layer.attended


def test_codes_that_something_else_read_are_an_error_at_the_next_token():
    layer = filled(Int8Layer())
    keys, values = layer.update(*states(1))
    assert torch.nn.functional.scaled_dot_product_attention(queries(1)[:, :HEADS], keys, values).isnan().all()
    with pytest.raises(ModelError, match="something else read them"):
        layer.update(*states(1))
    assert layer.get_seq_length() == 41


def test_without_the_kernel_it_is_dequantised_and_told_once(monkeypatch):
    here._warn_once.cache_clear()
    monkeypatch.setattr(here, "unavailable_because", lambda: "nothing was compiled")
    layer = filled(Int8Layer())
    q, given = queries(1), layer.update(*states(1))
    with pytest.warns(UserWarning, match="nothing was compiled"):
        found, _ = attention(MODULE, q, *given, None)
    torch.testing.assert_close(found, by_floats(q, layer.keys, layer.values).float())
    attention(MODULE, q, *layer.update(*states(1)), None)  # a second warning would be an error


@pytest.mark.not_under("inference", reason="no gradient is recorded in inference mode")
@pytest.mark.parametrize("why", ["gradient", "dropout", "dtype", "which keys"])
def test_what_the_kernel_has_not_is_dequantised_and_told(asked_of_kernel, why):
    here._warn_once.cache_clear()
    layer = filled(Int8Layer())
    tokens = 3 if why == "which keys" else 1
    q, given = queries(tokens), layer.update(*states(tokens))
    if why == "gradient":
        q.requires_grad_()
    if why == "dtype":
        q = q.double()
        layer.store.dtypes = (torch.float64, torch.float64)
        vars(given[0])["w8a8_keys"].dtypes = layer.store.dtypes
    told = {"which keys": "which keys it sees", "dtype": "float64"}.get(why, why)
    with pytest.warns(UserWarning, match=told):
        found, _ = attention(MODULE, q, *given, None, dropout=0.5 if why == "dropout" else 0.0)
    assert found.isfinite().all()
    assert found.requires_grad == (why == "gradient")
    assert [each for each in asked_of_kernel if each is not None] == []


def test_dropout_with_a_soft_cap_is_refused():
    with pytest.raises(ModelError, match=r"call model\.eval\(\)"):
        attention(MODULE, queries(2), *states(2), None, softcap=2.0, dropout=0.1)


def test_a_layer_that_was_reset_gives_floats_again():
    layer = filled(Int8Layer())
    layer.update(*states(1))
    layer.reset()
    assert layer.update(*states(1))[0].isfinite().all()


def test_who_looks_on_sees_floats(asked_of_kernel):
    layer = filled(Int8Layer())
    with FlopCounterMode(display=False):
        keys, values = layer.update(*states(1))
        attention(MODULE, queries(1), keys, values, None)
    assert keys.isfinite().all()
    assert not asked_of_kernel
    assert layer.update(*states(1))[0].isnan().all()


@pytest.mark.slow
@pytest.mark.not_under("meta", reason="dynamo makes tensors of its own")
def test_one_graph_of_a_token_serves_while_the_context_grows():
    model = causal("llama")
    model.set_attn_implementation("w8a8")
    ids = torch.randint(1, VOCAB, (2, 30))
    static, own = StaticCache(config=model.config, max_cache_len=30), DynamicCache(config=model.config)
    step = torch.compile(model.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        model(ids[:, :8], past_key_values=own)
        model(ids[:, :8], past_key_values=static)
        for at in range(8, 30):
            with torch._dynamo.config.patch(error_on_recompile=at > 8):
                found = step(ids[:, at : at + 1], past_key_values=static).logits
            wanted = model(ids[:, at : at + 1], past_key_values=own).logits
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
