import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tests import families
from tests.conftest import gpt2, llama, opt, relative_error
from tests.smoothing.conftest import parameters, unchanged
from w8a8 import outliers
from w8a8.errors import ModelError, NonFiniteError

PROFILE = torch.tensor([1.0, 2.0, 0.0, 40.0, 3.0, 1.5, 0.5])


def ratio(model, tokens, name):
    """Largest over median channel maximum of what a linear reads."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    absmax = seen[0].abs().flatten(0, -2).amax(0)
    return float(absmax.max() / absmax.median())


def test_a_model_gets_the_outliers_and_keeps_its_function(tokens):
    model = llama()
    with torch.no_grad():
        before = model.double()(tokens).logits
    model.float()
    was = ratio(model, tokens, "model.layers.1.mlp.up_proj")
    done = outliers.inject_(model, PROFILE)
    assert [record.norm for record in done] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    assert all(record.change < 1e-6 for record in done)
    assert ratio(model, tokens, "model.layers.1.mlp.up_proj") > 5 * was
    with torch.no_grad():
        after = model.double()(tokens).logits
    assert relative_error(after, before) < 1e-6


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma3", "gpt-neox", "mixtral", "bloom"])
def test_families_take_outliers_without_a_change_of_function(name):
    model = families.build(name)
    inputs = families.inputs(name)
    with torch.no_grad():
        before = model(**inputs).logits
        done = outliers.inject_(model, PROFILE, inputs=inputs)
        after = model(**inputs).logits
    assert done
    assert relative_error(after, before) < 1e-6  # Gemma computes its norm in float32


def test_power_exaggerates():
    mild, strong = (outliers.inject_(llama(), PROFILE, power=power)[0].largest for power in (1.0, 2.0))
    assert strong == pytest.approx(mild**2)


def test_power_zero_is_no_change_at_all():
    model = opt()
    before = parameters(model)
    assert {record.largest for record in outliers.inject_(model, PROFILE, power=0.0)} == {1.0}
    assert unchanged(model, before)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.just(0.0) | st.floats(1e-4, 1e4), min_size=1, max_size=40).filter(any),
    st.integers(1, 60),
)
def test_a_fitted_profile_is_positive_has_the_width_and_keeps_the_extremes(values, channels):
    values = torch.tensor(values, dtype=torch.float64)
    fitted = outliers._fitted(values, channels, 1.0, 0)
    assert fitted.shape == (channels,)
    assert bool((torch.isfinite(fitted) & (fitted > 0)).all())
    if channels > 1:
        live = values[values > 0]
        assert float(fitted.max() / fitted.min()) == pytest.approx(float(live.max() / live.min()), rel=1e-9)


def test_a_profile_of_the_right_width_keeps_its_order():
    values = torch.tensor([4.0, 2.0, 0.0, 8.0, 2.0])
    assert outliers._fitted(values, 5, 1.0, 0).tolist() == [2.0, 1.0, 1.0, 4.0, 1.0]  # the zero counts as the median


def test_a_file_by_module_names_is_dealt_to_layers_in_order(tmp_path):
    entries = {
        f"model.decoder.layers.{i}.{part}": torch.full((16,), 1.0).index_fill_(0, torch.tensor([3]), 10.0 + i + bonus)
        for i in (0, 1, 2, 10)
        for part, bonus in (("self_attn.q_proj", 0.0), ("self_attn.out_proj", 50.0), ("fc1", 5.0), ("fc2", 60.0))
    }
    save_file(entries, tmp_path / "profile.safetensors")
    records = outliers.inject_(llama(tie_word_embeddings=True), tmp_path / "profile.safetensors")
    assert [(r.profile, round(r.largest)) for r in records] == [
        ("model.decoder.layers.0.self_attn.q_proj", 10),
        ("model.decoder.layers.0.fc1", 15),
        ("model.decoder.layers.1.self_attn.q_proj", 11),
        ("model.decoder.layers.1.fc1", 16),
    ]


def test_a_mapping_by_the_models_own_names_is_taken_by_name():
    model = opt()
    own = {"model.decoder.layers.1.fc1": torch.arange(1.0, 49.0), "model.decoder.layers.0.fc1": torch.ones(48)}
    own |= {f"model.decoder.layers.{i}.self_attn.k_proj": torch.ones(48) for i in (0, 1)}
    records = {record.norm: record for record in outliers.inject_(model, own)}
    assert records["model.decoder.layers.1.final_layer_norm"].largest == pytest.approx(2.0)
    assert records["model.decoder.layers.0.self_attn_layer_norm"].profile.endswith("0.self_attn.k_proj")


@pytest.mark.parametrize(
    ("profile", "error", "message"),
    [
        (torch.zeros(4), NonFiniteError, "only zeros"),
        (torch.tensor([1.0, -1.0]), NonFiniteError, "negative"),
        (torch.tensor([1.0, float("nan")]), NonFiniteError, "not finite"),
        (torch.ones(2, 2), ModelError, r"not a vector of magnitudes: found shape \(2, 2\)"),
        ({}, ModelError, "empty mapping"),
        ({"encoder.fc2": torch.ones(4)}, ModelError, "no entry for model.layers.0.input_layernorm"),
        ("nowhere.safetensors", ModelError, "cannot be read"),
    ],
)
def test_a_bad_profile_changes_nothing(profile, error, message):
    model = llama()
    before = parameters(model)
    with pytest.raises(error, match=message):
        outliers.inject_(model, profile)
    assert unchanged(model, before)


def test_a_fold_that_changes_the_function_is_an_error_and_everything_is_put_back(monkeypatch):
    model = llama()
    before = parameters(model)
    changes = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(outliers.Gate, "change", lambda self, group: next(changes))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.input_layernorm .* changed the float output"):
        outliers.inject_(model, PROFILE)
    assert unchanged(model, before)


def test_an_interrupt_puts_everything_back(monkeypatch):
    model = gpt2()
    before = parameters(model)
    real, calls = outliers.fold_, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(outliers, "fold_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outliers.inject_(model, PROFILE)
    assert unchanged(model, before)


def test_a_model_without_norms_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="no norm of this Sequential"):
        outliers.inject_(model, torch.ones(4), inputs=torch.randn(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
