import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import w8a8
from tests.calibration.conftest import hooks, ids, inputs_of
from tests.conftest import gpt2, llama, mixtral, opt, relative_error
from w8a8.calibration.calibrate import _Shared, collect, static_grids
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import OBSERVERS, AbsMax, MinMax, Percentile
from w8a8.calibration.reservoir import Reservoir
from w8a8.core.affine import qparams
from w8a8.core.scheme import Operand, PerChannel, PerTensor, QuantSpec
from w8a8.errors import CalibrationError, NonFiniteError, SchemeError
from w8a8.kernels import first_choice
from w8a8.layers.linear import quant_linears

STATIC = QuantSpec(8, PerTensor(), dynamic=False)
LINEARS = ["q_proj", "k_proj", "v_proj"]


# --- statistics


def test_one_pass_gives_ranges_and_rows():
    model = llama()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    wanted = {name: (AbsMax(PerChannel()), MinMax(), Reservoir(20)) for name in names}
    found = collect(model, Calibration.of(ids()), wanted)
    for name in names:
        absmax, minmax, reservoir = found[name]
        x = inputs_of(model, name, ids())
        assert absmax.tokens == minmax.tokens == reservoir.tokens == len(x) == 72
        assert torch.equal(absmax.absmax, x.abs().amax(0))
        assert minmax.seen().lo.item() == x.min()
        assert reservoir.rows.shape == (20, x.shape[1])
        assert bool((reservoir.rows[:, None] == x[None]).all(-1).any(-1).all())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_and_modes_are_put_back_whatever_happens(error):
    model = llama().train()

    def stop(done, total, name):
        raise error

    with pytest.raises(error):
        collect(model, Calibration.of(ids()), {"lm_head": AbsMax()}, progress=stop)
    assert hooks(model) == 0
    assert model.training
    assert model.config.use_cache is True


def test_readers_of_one_tensor_share_one_measurement(monkeypatch):
    measured = []

    class Counting(AbsMax):
        def measure(self, x):
            measured.append(x.shape)
            return super().measure(x)

    model = llama(num_hidden_layers=1)
    names = [f"model.layers.0.self_attn.{name}" for name in LINEARS]
    found = collect(model, Calibration.of(ids()), {name: Counting() for name in names})
    assert len(measured) == 3
    collect(model, Calibration.of(ids()), {name: kind() for name, kind in zip(names, (AbsMax, Counting), strict=False)})
    assert len(measured) == 6  # another way to measure is not taken for the same
    assert {observer.absmax.item() for observer in found.values()} == {found[names[0]].absmax.item()}
    assert all(observer.tokens == 72 for observer in found.values())


def test_what_was_measured_is_forgotten_with_its_tensor():
    shared = _Shared()
    x = torch.ones(2, 3)
    shared.measured(x)["found"] = 1
    assert shared.measured(x) == {"found": 1}
    del x
    gc.collect()
    assert not shared._found


def test_a_module_that_reads_no_tensor_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Identity()

        def forward(self, x):
            return self.a(None)

    with pytest.raises(CalibrationError, match="a was called without a tensor"):
        collect(Model(), Calibration.of([torch.ones(2, 4)]), {"a": AbsMax()})


def test_a_tensor_that_was_changed_in_between_is_measured_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = x + 0.0
            self.a(h)
            return self.b(h.mul_(3.0))

    found = collect(Model(), Calibration.of([torch.ones(2, 4)]), {"a": AbsMax(), "b": AbsMax()})
    assert (found["a"].absmax.item(), found["b"].absmax.item()) == (1.0, 3.0)


def test_a_loop_in_inference_mode_is_measured_too():
    @torch.inference_mode()
    def loop(model):
        for batch in ids():
            model(batch)

    model = llama()
    names = [f"model.layers.0.self_attn.{name}" for name in LINEARS]
    found = collect(model, Calibration.of(loop), {name: AbsMax() for name in names})
    expected = inputs_of(model, names[0], ids()).abs().amax()
    assert all(torch.equal(observer.absmax[0], expected) for observer in found.values())


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_loop_may_pass_in_and_out_of_inference_mode(first):
    batches = [torch.randint(0, 96, (8, 48)) for _ in range(4)]  # more tokens than smoothing keeps

    def loop(model):
        for number, batch in enumerate(batches):
            with torch.inference_mode(first is (number % 2 == 0)):
                model(batch)

    how = {"scheme": "w8a8-static", "smooth": "searched", "observer": "percentile"}
    model = llama()
    wanted = w8a8.quantize(copy.deepcopy(model), calibration=batches, **how).model.state_dict()
    found = w8a8.quantize(model, calibration=loop, **how).model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("make", [llama, opt])
def test_tokens_that_the_mask_hides_do_not_count(make):
    model = make()
    batch, mask = ids(1)[0], torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    name = next(name for name, module in model.named_modules() if name.endswith(("fc2", "down_proj")))
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    inputs = {"input_ids": batch, "attention_mask": mask}
    found = collect(model, Calibration.of([inputs]), {name: (AbsMax(PerChannel()), Reservoir(100))})[name]
    handle.remove()
    (x,) = seen
    kept = x.reshape(-1, x.shape[-1])[mask.reshape(-1).bool()]
    assert found[0].tokens == found[1].tokens == 19
    assert torch.equal(found[0].absmax, kept.abs().amax(0))


def test_the_mask_of_an_encoder_decoder_is_of_one_stream_only_and_is_not_applied():
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids(1)[0], "attention_mask": mask, "decoder_input_ids": ids(1)[0]}
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    found = collect(model, Calibration.of([inputs]), {name: AbsMax() for name in names})
    assert [found[name].tokens for name in names] == [24, 24]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=str)
def test_no_activation_is_kept(granularity):
    model = opt()
    names = [name for name, module in model.named_modules() if name.endswith(("q_proj", "fc2"))]
    seen = []
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    kinds = [*OBSERVERS.values()]
    statistics = {name: (*(kind(granularity) for kind in kinds), Reservoir(8)) for name in names}
    collect(model, Calibration.of(ids()), statistics)
    gc.collect()
    assert len(seen) == 3 * len(names)
    assert not [ref for ref in seen if ref() is not None]


def test_an_input_that_is_given_by_name_is_read():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(input=x)

    assert collect(Model(), Calibration.of([torch.ones(2, 4)]), {"a": AbsMax()})["a"].tokens == 2


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM has no module 'model.head'"):
        collect(llama(), Calibration.of(ids()), {"model.head": AbsMax()})


def test_an_infinity_names_the_layer_and_leaves_no_hook():
    model = opt()
    with torch.no_grad():
        model.model.decoder.layers[0].self_attn_layer_norm.weight[3] = torch.inf
    with pytest.raises(NonFiniteError, match="at index") as caught:
        collect(model, Calibration.of(ids()), {"model.decoder.layers.0.self_attn.q_proj": AbsMax()})
    assert "while observing what model.decoder.layers.0.self_attn.q_proj reads" in caught.value.explain()
    assert hooks(model) == 0


# --- static grids, in quantize


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (llama, [("model.layers.{}.self_attn.", LINEARS), ("model.layers.{}.mlp.", ["gate_proj", "up_proj"])]),
        (opt, [("model.decoder.layers.{}.self_attn.", LINEARS)]),
    ],
)
def test_layers_that_read_one_tensor_get_one_grid(make, groups, observer):
    """vLLM fuses q, k and v, and gate and up, and takes one input scale for them."""
    model = make()
    w8a8.quantize(model, "w8a8-static", calibration=ids(), observer=observer, smooth="none")
    layers = dict(quant_linears(model))
    for prefix, names in groups:
        for i in range(2):
            scales = {float(layers[prefix.format(i) + name].input_scale) for name in names}
            assert len(scales) == 1
    assert len({float(layer.input_scale) for layer in layers.values()}) > 4


@pytest.mark.parametrize("make", [llama, opt, gpt2])
@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-o3"])
def test_static_models_are_near_the_float_one_and_scales_are_those_of_the_data(make, scheme):
    model = make()
    name = next(name for name, module in model.named_modules() if name.endswith(("fc2", "down_proj", "mlp.c_proj")))
    expected = qparams(inputs_of(model, name, ids()), STATIC, Operand.ACTIVATION).scale
    with torch.no_grad():
        wanted = model(ids()[0]).logits
    w8a8.quantize(model, scheme, calibration=ids(), smooth="none")
    assert torch.equal(model.get_submodule(name).input_scale, expected.reshape(1))
    with torch.no_grad():
        got = model(ids()[0]).logits
    assert relative_error(got, wanted) < 0.03


@pytest.mark.kernels
def test_simulated_static_logits_are_the_integer_ones_and_the_first_kernel_runs(tokens):
    model = opt()
    how = {"scheme": "w8a8-static", "calibration": ids(), "smooth": "none"}
    simulated = w8a8.simulate(copy.deepcopy(model), **how).model
    reference = w8a8.quantize(copy.deepcopy(model), **how, kernel="reference").model
    result = w8a8.quantize(model, **how)
    with torch.inference_mode():
        logits = result.model(tokens).logits
        assert torch.equal(simulated(tokens).logits, logits)
        assert torch.equal(reference(tokens).logits, logits)
    assert {kernel for kernels in result.ledger().values() for kernel in kernels} == {first_choice("auto")}


def test_asymmetric_static_activations_take_an_observer_with_a_range(tokens):
    scheme = w8a8.Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, PerTensor(), symmetric=False, dynamic=False))
    model = opt()
    passes = []
    with pytest.raises(SchemeError, match="'absmax' has no zero point"):
        w8a8.quantize(model, scheme, calibration=lambda model: passes.append(1))
    assert passes == []  # told before the passes
    with torch.inference_mode():
        expected = model(tokens).logits
        result = w8a8.quantize(model, scheme, calibration=ids(), observer=lambda: Percentile(p=99.9))
        assert relative_error(model(tokens).logits, expected) < 0.05
    assert all(layer.input_zero_point is not None for _, layer in quant_linears(result.model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SchemeError, "the scheme w8a8-static has static activation scales, and there is no calibration data"),
        ({"calibration": []}, CalibrationError, "is empty"),
        ({"calibration": ids(), "observer": "max"}, CalibrationError, "unknown observer 'max'"),
        ({"calibration": ids(), "observer": "max", "scheme": "w8a8"}, CalibrationError, "unknown observer 'max'"),
        ({"calibration": [torch.full((1, 4), 99)]}, IndexError, "index out of range"),
    ],
)
def test_a_bad_request_changes_nothing(options, error, message):
    model = llama().train()
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        w8a8.quantize(model, **{"scheme": "w8a8-static", **options})
    assert dict(model.named_modules()) == before
    assert hooks(model) == 0
    assert model.training


def test_a_layer_that_reads_nothing_is_named_and_nothing_is_guessed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Model()
    batch = [torch.ones(2, 4)]
    with pytest.raises(CalibrationError, match=r"1 of 2 layers read no token .*: unused; calibrated on 1 batches"):
        w8a8.quantize(model, "w8a8-static", calibration=batch)
    assert isinstance(model.used, nn.Linear)
    w8a8.quantize(model, "w8a8-static", calibration=batch, exclude=["unused"])
    assert float(model.used.input_scale) == pytest.approx(1 / 127)


def test_an_interrupted_calibration_leaves_the_model_as_it_was():
    model = llama()
    before = dict(model.named_modules())

    def interrupt(done, total, name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        w8a8.quantize(model, "w8a8-static", calibration=ids(), progress=interrupt)
    assert dict(model.named_modules()) == before
    assert hooks(model) == 0


def test_a_dynamic_scheme_may_come_with_data(tokens):
    model = llama()
    plain = w8a8.quantize(copy.deepcopy(model)).model
    given = w8a8.quantize(model, calibration=ids(), smooth="none").model
    with torch.inference_mode():
        assert torch.equal(plain(tokens).logits, given(tokens).logits)


def test_a_head_in_int8_gets_its_static_scale():
    model = llama()
    w8a8.quantize(model, "w8a8-static", calibration=ids(), head="int8", smooth="none")
    assert model.lm_head.input_scale is not None


def test_a_bfloat16_model_calibrates_in_its_dtype():
    model = llama().to(torch.bfloat16)
    name = "model.layers.0.mlp.down_proj"
    grids = static_grids(model, [name], STATIC, Calibration.of(ids()))
    assert torch.equal(grids[name].scale, qparams(inputs_of(model, name, ids()), STATIC, Operand.ACTIVATION).scale)


def test_a_mixture_of_experts_calibrates_what_is_linear(tokens):
    model = w8a8.quantize(mixtral(), "w8a8-static", calibration=ids(), smooth="none").model
    with torch.inference_mode():
        assert model(tokens).logits.isfinite().all()
