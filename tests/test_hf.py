"""transformers, unmodified: quantised while loading, W8A8 directories in integers, saved as `save` saves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MixtralForCausalLM,
    initialization,
    pipeline,
)
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import w8a8
from tests.conftest import every_third, gpt2, llama, mixtral, model_files, nemotron_h, opt, qwen3_moe
from tests.core.test_packed import SCHEMES as PACKABLE
from tests.core.test_packed import packed_directory
from w8a8 import QuantLinear, W8A8Config, hf
from w8a8.checkpoint.describe import describe
from w8a8.checkpoint.layout import from_json, to_json
from w8a8.core.scheme import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError, FormatError, KernelError, ModelError, PatternError, SchemeError
from w8a8.hf import enabling
from w8a8.layers.linear import quant_linears
from w8a8.model.experts import Experts, holds_experts

FIXTURES = Path(__file__).parent / "data" / "llmcompressor"
IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def _theirs_again():
    yield
    hf.disable()


@pytest.fixture(params=["demo", "llama", "gpt2", "mixtral", "qwen3_moe"])
def source(request, tmp_path):
    if request.param == "demo":
        return demo_directory()
    {"llama": llama, "gpt2": gpt2, "mixtral": mixtral, "qwen3_moe": qwen3_moe}[request.param]().save_pretrained(
        tmp_path / "source"
    )
    return tmp_path / "source"


def opened(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def quantized(source, scheme="w8a8", *, dtype="auto", **options):
    model = opened(source, dtype=dtype)
    w8a8.quantize(model, scheme, **options)
    return model


class TestQuantisingWhileLoading:
    @pytest.mark.parametrize("include", [["*.q_proj"], ["*.q_proj", "*.experts.1.*"]], ids=str)
    @pytest.mark.parametrize("make", [mixtral, qwen3_moe, nemotron_h], ids=lambda make: make.__name__)
    def test_experts_are_taken_as_quantize_takes_them(self, tmp_path, make, include):
        make().save_pretrained(tmp_path / "source")
        model = opened(tmp_path / "source", quantization_config=W8A8Config(include=include))
        wanted = quantized(tmp_path / "source", include=include)
        assert [type(m) for m in model.modules()] == [type(m) for m in wanted.modules()]
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, wanted(IDS).logits)

    def test_experts_that_lie_stacked_in_the_files_stay_float(self, tmp_path):
        mixtral().save_pretrained(tmp_path / "source", save_original_format=False)
        model = opened(tmp_path / "source", quantization_config=W8A8Config())
        wanted = quantized(tmp_path / "source", exclude=["*.experts.*"])
        assert not holds_experts(model)
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)

    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-o1", "w8a16"])
    def test_the_model_is_that_of_quantize(self, source, scheme):
        model = opened(source, quantization_config=W8A8Config(scheme))
        wanted = quantized(source, scheme)
        found, held = model.state_dict(), wanted.state_dict()
        assert found.keys() == held.keys()
        assert all(torch.equal(found[name], held[name]) and found[name].dtype == held[name].dtype for name in held)
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)
        lost = [{name: layer.weight_sqnr_db for name, layer in quant_linears(m)} for m in (model, wanted)]
        assert lost[0] == pytest.approx(lost[1], rel=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_another_dtype_it_is_what_quantize_makes_of_the_model_in_that_dtype(self, dtype):
        model = opened(demo_directory(), dtype=dtype, quantization_config=W8A8Config())
        assert torch.equal(model(IDS).logits, quantized(demo_directory(), dtype=dtype)(IDS).logits)

    def test_it_takes_how_layers_are_run(self):
        model = opened(demo_directory(), quantization_config=W8A8Config(kernel="reference", strict=True, head="int8"))
        assert {(layer.kernel, layer.strict) for _, layer in quant_linears(model)} == {("reference", True)}
        assert torch.equal(model(IDS).logits, quantized(demo_directory(), head="int8")(IDS).logits)

    @pytest.mark.parametrize("options", [{"head": "int8"}, {"include": ["*fc?"], "exclude": ["*.1.*"]}], ids=str)
    def test_its_options_are_those_of_quantize(self, options):
        model = opened(demo_directory(), quantization_config=W8A8Config(**options))
        wanted = quantized(demo_directory(), **options)
        assert [name for name, _ in quant_linears(model)] == [name for name, _ in quant_linears(wanted)]
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)

    def test_what_cannot_be_done_is_told_before_anything_is_loaded(self):
        with pytest.raises(SchemeError, match=r"to measure them on: load the float model and call"):
            W8A8Config("w8a8-static")
        with pytest.raises(SchemeError, match="unknown scheme 'w8a9'"):
            W8A8Config("w8a9")
        with pytest.raises(ModelError, match="head='int4'"):
            W8A8Config(head="int4")
        with pytest.raises(TypeError, match="shceme"):
            W8A8Config(shceme="w8a8")
        with pytest.raises(PatternError, match="'fc9' matches none"):
            opened(demo_directory(), quantization_config=W8A8Config(include=["fc9"]))
        with pytest.raises(SchemeError, match="lm_head is tied to another layer, so the files"):
            opened(demo_directory(), quantization_config=W8A8Config(include=["*", "lm_head"]))

    def test_a_weight_that_is_not_finite_is_refused(self, tmp_path, caplog):
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
        model.save_pretrained(tmp_path / "bad")
        with pytest.raises(RuntimeError, match="conversion of the weights"):  # transformers' own, after a report
            opened(tmp_path / "bad", quantization_config=W8A8Config())
        assert "nan at index (3, 4)" in caplog.text
        assert "while quantising model.layers.1.mlp.up_proj" in caplog.text

    def test_a_weight_that_is_not_in_the_files_is_not_made_up(self, tmp_path):
        shutil.copytree(demo_directory(), tmp_path / "torn")
        tensors = load_file(tmp_path / "torn" / "model.safetensors")
        del tensors["model.decoder.layers.2.fc1.weight"]
        save_file(tensors, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            CheckpointError, match=r"model\.decoder\.layers\.2\.fc1 is to be quantised .* not in the files"
        ):
            opened(tmp_path / "torn", quantization_config=W8A8Config())
        left = opened(tmp_path / "torn", quantization_config=W8A8Config(exclude=["model.decoder.layers.2.fc1"]))
        assert type(left.get_submodule("model.decoder.layers.2.fc1")) is torch.nn.Linear


class Asking(MixtralForCausalLM):
    """Initialises experts through the module above them, as Qwen3-Omni's thinker does."""

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MixtralSparseMoeBlock):
            initialization.normal_(module.experts.gate_up_proj)
            initialization.normal_(module.experts.down_proj)


class TestEnable:
    def test_a_model_that_asks_experts_for_a_stack_while_it_is_initialised_is_loaded(self, tmp_path):
        model = Asking(mixtral().config).eval()
        model.save_pretrained(tmp_path / "float")
        w8a8.quantize(model)
        w8a8.save(model, tmp_path / "saved")
        w8a8.enable()
        found = Asking.from_pretrained(tmp_path / "saved")
        assert torch.equal(found(IDS).logits, model(IDS).logits)
        found = Asking.from_pretrained(tmp_path / "float", quantization_config=W8A8Config())
        assert torch.equal(found(IDS).logits, model(IDS).logits)
        for experts in (module for module in found.modules() if isinstance(module, Experts)):
            with pytest.raises(AttributeError, match="down_proj"):
                experts.down_proj  # noqa: B018 - it is there while the model is loaded only

    def test_a_directory_of_ours_runs_in_integers(self, source, tmp_path):
        model = quantized(source)
        w8a8.save(model, tmp_path / "saved")
        w8a8.enable()
        found = opened(tmp_path / "saved")
        assert torch.equal(found(IDS).logits, w8a8.load(tmp_path / "saved")(IDS).logits)
        ledger = w8a8.ledger(found)
        assert ledger
        assert all(sum(calls.values()) == 1 for calls in ledger.values())

    @pytest.mark.parametrize(
        "name",
        [
            "llama-w8a8",
            "llama-w8a8-asym",
            "llama-w8a8-bf16",
            "llama-w8a8-static-asym",
            "mixtral-w8a8",
            "opt-w8a8",
            "qwen3-moe-w8a8",
        ],
    )
    def test_a_directory_of_llm_compressor_runs_in_integers(self, name):
        w8a8.enable()
        model = opened(FIXTURES / name)
        assert torch.equal(model(IDS).logits, w8a8.load(FIXTURES / name)(IDS).logits)
        assert all(layer.weight_scale.dtype is torch.float32 for _, layer in quant_linears(model))

    def test_it_takes_how_layers_are_run_and_the_last_call_holds(self, tmp_path):
        w8a8.save(quantized(demo_directory()), tmp_path / "saved")
        w8a8.enable(kernel="torch_cpu")
        w8a8.enable(kernel="reference", head="int8", strict=True)
        found = opened(tmp_path / "saved")
        wanted = w8a8.load(tmp_path / "saved", head="int8")
        assert {layer.kernel for _, layer in quant_linears(found)} == {"reference"}
        assert all(layer.strict for _, layer in quant_linears(found))
        assert "lm_head" in dict(quant_linears(found))
        assert torch.equal(found(IDS).logits, wanted(IDS).logits)
        assert {kernel for calls in w8a8.ledger(found).values() for kernel in calls} == {"reference"}
        with w8a8.enabled(kernel="torch_cpu"):
            assert {layer.kernel for _, layer in quant_linears(opened(tmp_path / "saved"))} == {"torch_cpu"}
        assert {layer.kernel for _, layer in quant_linears(opened(tmp_path / "saved"))} == {"reference"}

    @pytest.mark.parametrize("call", [W8A8Config, w8a8.enable], ids=["W8A8Config", "enable"])
    def test_what_names_no_kernel_or_head_is_told_before_anything_is_loaded(self, call):
        with pytest.raises(KernelError, match=r"unknown kernel 'natve' \(closest: native"):
            call(kernel="natve")
        with pytest.raises(ModelError, match="head='int4'"):
            call(head="int4")
        assert not isinstance(AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"], enabling._Ours)

    def test_before_and_after_it_transformers_does_as_it_always_did(self, tmp_path):
        w8a8.save(quantized(demo_directory()), tmp_path / "saved")
        before = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
        w8a8.enable()
        w8a8.enable()
        w8a8.disable()
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is before
        w8a8.disable()
        assert not list(quant_linears(opened(tmp_path / "saved")))
        with w8a8.enabled():
            assert list(quant_linears(opened(tmp_path / "saved")))
        assert not list(quant_linears(opened(tmp_path / "saved")))

    @pytest.mark.parametrize(
        "scheme", every_third(s for s in PACKABLE if s.weight_only or s.weights.bits == 8), ids=str
    )
    def test_packed_directories_run_as_load_runs_them(self, tmp_path, scheme):
        packed_directory(tmp_path / "d", scheme)
        wanted = w8a8.load(tmp_path / "d")
        w8a8.enable()
        found = opened(tmp_path / "d")
        assert {layer.mode for _, layer in quant_linears(found)} == {layer.mode for _, layer in quant_linears(wanted)}
        assert torch.equal(found(IDS).logits, wanted(IDS).logits)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(found.generate(IDS, **options), wanted.generate(IDS, **options))

    @pytest.mark.parametrize(
        "scheme",
        [
            "w8a16",
            Scheme(QuantSpec(8, PerChannel(), symmetric=False), QuantSpec(8, PerToken())),
            Scheme(QuantSpec(4, PerGroup(4)), QuantSpec(8, PerToken(), symmetric=False)),
            Scheme(QuantSpec(6, PerTensor())),
        ],
        ids=str,
    )
    def test_whatever_load_runs_is_run_and_saved_again(self, tmp_path, scheme):
        w8a8.save(w8a8.quantize(llama(), scheme).model, tmp_path / "d")
        w8a8.enable()
        found = opened(tmp_path / "d")
        assert torch.equal(found(IDS).logits, w8a8.load(tmp_path / "d")(IDS).logits)
        found.save_pretrained(tmp_path / "again", save_original_format=False)
        assert model_files(tmp_path / "again") == model_files(tmp_path / "d")

    def test_scales_in_the_shapes_and_dtypes_of_others_are_taken_as_load_takes_them(self, tmp_path):
        w8a8.save(w8a8.quantize(llama()).model, tmp_path / "d")
        path = tmp_path / "d" / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"].flatten().to(torch.bfloat16)
        tensors[f"{name}_zero_point"] = torch.zeros(100, 1, dtype=torch.int8)  # as older files have it
        save_file(tensors, path, metadata={"format": "pt"})
        w8a8.enable()
        assert torch.equal(opened(tmp_path / "d")(IDS).logits, w8a8.load(tmp_path / "d")(IDS).logits)
        tensors[f"{name}_zero_point"][3] = 1
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*up_proj\.weight_zero_point is not zero"):
            opened(tmp_path / "d")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("weight", torch.zeros(100, 64, dtype=torch.float16), r"float16 of shape \(100, 64\), expected int8"),
            (
                "weight",
                torch.zeros(100, 63, dtype=torch.int8),
                r"int8 of shape \(100, 63\), expected .*shape \(100, 64\)",
            ),
            ("weight_scale", torch.full((100, 1), torch.nan), "a scale that is not positive and finite"),
            ("weight_scale", torch.ones(100, 1, dtype=torch.int32), "expected a float scale"),
        ],
    )
    def test_what_load_refuses_is_refused(self, tmp_path, key, value, message):
        w8a8.save(w8a8.quantize(llama()).model, tmp_path / "d")
        path = tmp_path / "d" / "model.safetensors"
        save_file(load_file(path) | {f"model.layers.0.mlp.up_proj.{key}": value}, path, metadata={"format": "pt"})
        for opens in (w8a8.load, opened):
            w8a8.enable()
            with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*up_proj\.{key} .*{message}"):
                opens(tmp_path / "d")

    @pytest.mark.parametrize("key", ["weight", "bias", "weight_g_idx"])
    def test_what_a_layer_has_no_place_for_is_refused(self, tmp_path, key):
        w8a8.save(w8a8.quantize(mixtral(), "w8a16").model, tmp_path / "d")
        path = tmp_path / "d" / "model.safetensors"
        name = f"model.layers.0.block_sparse_moe.experts.1.w2.{key}"
        save_file(load_file(path) | {name: torch.ones(32, 40)}, path, metadata={"format": "pt"})
        for opens in (w8a8.load, opened):
            w8a8.enable()
            with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} has no place in Mixtral"):
                opens(tmp_path / "d")

    @pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
    def test_two_names_in_the_files_for_one_tensor_are_refused(self, tmp_path, scheme):
        w8a8.save(w8a8.quantize(mixtral(), scheme).model, tmp_path / "d")
        path = tmp_path / "d" / "model.safetensors"
        tensors = load_file(path)
        inside = "model.layers.0.block_sparse_moe.experts.0.w1."
        twice = {name.replace("block_sparse_moe", "mlp"): t + 1 for name, t in tensors.items() if inside in name}
        save_file(tensors | twice, path, metadata={"format": "pt"})
        for opens in (w8a8.load, opened):
            w8a8.enable()
            with pytest.raises(CheckpointError, match=r"is in model\.safetensors too: two values for one tensor"):
                opens(tmp_path / "d")

    def test_values_without_files_are_refused(self, tmp_path):
        model = w8a8.quantize(llama()).model
        w8a8.enable()
        with pytest.raises(
            CheckpointError, match="filled from safetensors files, and none are given: load a directory"
        ):
            type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())

    @pytest.mark.parametrize(
        "change",
        [
            {"weights": {"num_bits": 16}},
            {"weights": {"type": "float"}},
            {"weights": {"strategy": "block", "block_structure": [128, 128]}},
            {"weights": {"actorder": "group"}},
            {"weights": {"num_bits": 3}, "format": "pack-quantized"},
            {"weights": None},
            {"input_activations": {"dynamic": "local"}},
            {"output_activations": {"num_bits": 8}},
            {"kv_cache_scheme": {"num_bits": 8, "type": "int"}},
            {"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "config_groups": {}},
            {"format": "float-quantized"},
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
        ],
        ids=str,
    )
    def test_what_is_not_ours_goes_to_transformers_quantizer(self, change):
        theirs, asked = to_json(describe(w8a8.quantize(llama()).model)), []
        group = theirs["config_groups"]["group_0"]
        for key, value in change.items():
            if key in group and key != "format":
                group[key] = {**group[key], **value} if group[key] and value else value
            else:
                theirs[key] = group["format"] = value
        if "kv_cache_scheme" in change or "sparsity_config" in change:
            group["format"] = None

        class Theirs:
            @classmethod
            def from_dict(cls, config, **kwargs):
                asked.append(config)
                return "theirs"

        assert enabling._Ours(Theirs, {}).from_dict(theirs) == "theirs"
        assert asked == [theirs]
        with pytest.raises(FormatError):  # `load` does not run it either
            from_json(theirs, "config.json")

    def test_a_malformed_description_of_our_layers_is_an_error(self, tmp_path):
        w8a8.save(quantized(demo_directory()), tmp_path / "saved")
        path = tmp_path / "saved" / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = "no"
        path.write_text(json.dumps(config))
        w8a8.enable()
        with pytest.raises(CheckpointError, match=r"group_0\.weights\.symmetric is 'no'"):
            opened(tmp_path / "saved")

    def test_a_missing_scale_is_not_made_up(self, tmp_path):
        w8a8.save(quantized(demo_directory()), tmp_path / "saved")
        path = tmp_path / "saved" / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.decoder.layers.0.fc1.weight_scale"]
        save_file(tensors, path, metadata={"format": "pt"})
        w8a8.enable()
        with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight_scale is missing"):
            opened(tmp_path / "saved")

    def test_pipelines_run_it(self, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(demo_directory())
        w8a8.save(quantized(demo_directory()), tmp_path / "saved", tokenizer)
        w8a8.enable()
        run = pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
        text = run("Return the", max_new_tokens=5, do_sample=False)[0]["generated_text"]
        assert text.startswith("Return the")
        assert all(isinstance(layer.fc1, QuantLinear) for layer in run.model.model.decoder.layers)
        assert all(sum(calls.values()) >= 5 for calls in w8a8.ledger(run.model).values())

    def test_the_evaluation_harness_runs_it(self, tmp_path):
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        tokenizer = AutoTokenizer.from_pretrained(demo_directory())
        w8a8.save(quantized(demo_directory()), tmp_path / "saved", tokenizer)
        w8a8.enable()
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # it hands on what the file says
            harness = HFLM(pretrained=str(tmp_path / "saved"), device="cpu", batch_size=1)
        harness.loglikelihood([Instance("loglikelihood", {}, ("Return", " the"), 0)], disable_tqdm=True)
        assert all(sum(calls.values()) > 0 for calls in w8a8.ledger(harness.model).values())


class TestSaving:
    def test_weight_only_models_are_written_in_words(self, source, tmp_path):
        model = opened(source, quantization_config=W8A8Config("w8a16"))
        w8a8.save(quantized(source, "w8a16"), tmp_path / "wanted")
        config = json.loads((tmp_path / "wanted/config.json").read_text())
        assert config["quantization_config"]["format"] == "pack-quantized"
        model.save_pretrained(tmp_path / "loading")
        assert model_files(tmp_path / "loading") == model_files(tmp_path / "wanted")
        w8a8.load(tmp_path / "wanted").save_pretrained(tmp_path / "loaded")
        assert model_files(tmp_path / "loaded") == model_files(tmp_path / "wanted")
        w8a8.enable()
        opened(tmp_path / "wanted").save_pretrained(tmp_path / "enabled")
        assert model_files(tmp_path / "enabled") == model_files(tmp_path / "wanted")

    def test_models_of_both_formats_come_back(self, tmp_path):
        model = quantized(demo_directory(), {"*.self_attn.*": "w8a8", "*": "w8a16"})
        w8a8.save(model, tmp_path / "wanted")
        w8a8.enable()
        found = opened(tmp_path / "wanted")
        assert torch.equal(found(IDS).logits, model(IDS).logits)
        found.save_pretrained(tmp_path / "enabled")
        assert model_files(tmp_path / "enabled") == model_files(tmp_path / "wanted")

    @pytest.mark.parametrize("options", [{}, {"head": "int8"}], ids=str)
    def test_save_pretrained_writes_what_save_writes(self, source, tmp_path, options):
        if options and "mixtral" in str(source):
            pytest.skip("one is enough")
        model = opened(source, quantization_config=W8A8Config(**options))
        w8a8.save(quantized(source, **options), tmp_path / "wanted")
        model.save_pretrained(tmp_path / "loading")
        assert model_files(tmp_path / "loading") == model_files(tmp_path / "wanted")
        w8a8.save(model, tmp_path / "ours")
        assert model_files(tmp_path / "ours") == model_files(tmp_path / "wanted")
        w8a8.enable()
        opened(tmp_path / "wanted").save_pretrained(tmp_path / "enabled")
        assert model_files(tmp_path / "enabled") == model_files(tmp_path / "wanted")

    def test_after_quantize_and_load_save_pretrained_writes_it_too(self, source, tmp_path):
        model = quantized(source)
        w8a8.save(model, tmp_path / "wanted")
        model.save_pretrained(tmp_path / "quantized")
        assert model_files(tmp_path / "quantized") == model_files(tmp_path / "wanted")
        w8a8.load(tmp_path / "wanted").save_pretrained(tmp_path / "loaded")
        assert model_files(tmp_path / "loaded") == model_files(tmp_path / "wanted")

    def test_dense_models_need_no_option(self, tmp_path):
        model = opened(demo_directory(), quantization_config=W8A8Config())
        model.save_pretrained(tmp_path / "plain")
        w8a8.save(model, tmp_path / "wanted")
        assert model_files(tmp_path / "plain") == model_files(tmp_path / "wanted")
        shutil.rmtree(tmp_path / "plain")
        w8a8.enable()
        opened(tmp_path / "wanted").save_pretrained(tmp_path / "plain")
        assert model_files(tmp_path / "plain") == model_files(tmp_path / "wanted")


def test_an_opt_without_tied_head_keeps_it_float(tmp_path):
    opt(tie_word_embeddings=False).save_pretrained(tmp_path / "source")
    model = opened(tmp_path / "source", quantization_config=W8A8Config())
    assert isinstance(model.lm_head, torch.nn.Linear)


class TestBaseAndTask:
    """The base of a task model and the other way round, as transformers loads float models."""

    def directory(self, tmp_path, model, *, head="float"):
        w8a8.save(w8a8.quantize(model, head=head).model, tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("head", ["float", "int8"])
    @pytest.mark.parametrize("make", [llama, opt, mixtral], ids=lambda make: make.__name__)
    def test_the_base_of_a_causal_model(self, tmp_path, make, head):
        model = make()
        directory = self.directory(tmp_path, model, head=head)
        hf.enable()
        base = AutoModel.from_pretrained(directory)
        with torch.inference_mode():
            wanted = model(IDS, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(base(IDS).last_hidden_state, wanted)

    def test_the_base_of_a_classifier(self, tmp_path):
        model = bert_classifier()
        directory = self.directory(tmp_path, model)
        hf.enable()
        base = AutoModel.from_pretrained(directory)
        with torch.inference_mode():
            assert torch.equal(base(IDS).last_hidden_state, model.bert(IDS).last_hidden_state)

    def test_a_task_models_head_is_made_anew_and_float(self, tmp_path, caplog):
        model = llama()
        directory = self.directory(tmp_path, model.model)
        hf.enable()
        task = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
        assert type(task.score) is torch.nn.Linear
        with torch.inference_mode():
            assert torch.equal(task.model(IDS).last_hidden_state, model.model(IDS).last_hidden_state)

    def test_a_layer_that_was_lost_is_missed(self, tmp_path):
        directory = self.directory(tmp_path, llama())
        path = directory / "model.safetensors"
        kept = {name: t for name, t in load_file(path).items() if not name.startswith("model.layers.1.mlp.up_proj")}
        save_file(kept, path, {"format": "pt"})
        hf.enable()
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
            opened(directory)


def bert_classifier():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = BertConfig(vocab_size=96, max_position_embeddings=64, **small)
    return BertForSequenceClassification(config).eval()
