"""Directories in transformers' hands run in integers, and what is not ours stays theirs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
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
from tests.conftest import every_third, llama, mixtral, model_files, opt
from tests.core.test_packed import SCHEMES as PACKABLE
from tests.core.test_packed import packed_directory
from tests.hf.conftest import IDS, opened, quantized
from w8a8 import QuantLinear, W8A8Config, hf
from w8a8.checkpoint.describe import describe
from w8a8.checkpoint.layout import from_json, to_json
from w8a8.core.scheme import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError, FormatError, KernelError, ModelError
from w8a8.hf import enabling
from w8a8.layers.linear import quant_linears
from w8a8.model.experts import Experts

FIXTURES = Path(__file__).parents[1] / "data" / "llmcompressor"


class Asking(MixtralForCausalLM):
    """Initialises experts through the module above them, as Qwen3-Omni's thinker does."""

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MixtralSparseMoeBlock):
            initialization.normal_(module.experts.gate_up_proj)
            initialization.normal_(module.experts.down_proj)


@pytest.mark.slow
def test_a_model_that_asks_experts_for_a_stack_while_it_is_initialised_is_loaded(tmp_path):
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


def test_a_directory_of_ours_runs_in_integers(source, tmp_path):
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
def test_a_directory_of_llm_compressor_runs_in_integers(name):
    w8a8.enable()
    model = opened(FIXTURES / name)
    assert torch.equal(model(IDS).logits, w8a8.load(FIXTURES / name)(IDS).logits)
    assert all(layer.weight_scale.dtype is torch.float32 for _, layer in quant_linears(model))


def test_it_takes_how_layers_are_run_and_the_last_call_holds(tmp_path):
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
def test_what_names_no_kernel_or_head_is_told_before_anything_is_loaded(call):
    with pytest.raises(KernelError, match=r"unknown kernel 'natve' \(closest: native"):
        call(kernel="natve")
    with pytest.raises(ModelError, match="head='int4'"):
        call(head="int4")
    assert not isinstance(AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"], enabling._Ours)


def test_before_and_after_it_transformers_does_as_it_always_did(tmp_path):
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


@pytest.mark.parametrize("scheme", every_third(s for s in PACKABLE if s.weight_only or s.weights.bits == 8), ids=str)
def test_packed_directories_run_as_load_runs_them(tmp_path, scheme):
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
def test_whatever_load_runs_is_run_and_saved_again(tmp_path, scheme):
    w8a8.save(w8a8.quantize(llama(), scheme).model, tmp_path / "d")
    w8a8.enable()
    found = opened(tmp_path / "d")
    assert torch.equal(found(IDS).logits, w8a8.load(tmp_path / "d")(IDS).logits)
    found.save_pretrained(tmp_path / "again", save_original_format=False)
    assert model_files(tmp_path / "again") == model_files(tmp_path / "d")


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
def test_what_is_not_ours_goes_to_transformers_quantizer(change):
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


def test_a_malformed_description_of_our_layers_is_an_error(tmp_path):
    w8a8.save(quantized(demo_directory()), tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = "no"
    path.write_text(json.dumps(config))
    w8a8.enable()
    with pytest.raises(CheckpointError, match=r"group_0\.weights\.symmetric is 'no'"):
        opened(tmp_path / "saved")


def test_pipelines_run_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    w8a8.save(quantized(demo_directory()), tmp_path / "saved", tokenizer)
    w8a8.enable()
    run = pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
    text = run("Return the", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("Return the")
    assert all(isinstance(layer.fc1, QuantLinear) for layer in run.model.model.decoder.layers)
    assert all(sum(calls.values()) >= 5 for calls in w8a8.ledger(run.model).values())


def test_the_evaluation_harness_runs_it(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    w8a8.save(quantized(demo_directory()), tmp_path / "saved", tokenizer)
    w8a8.enable()
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # it hands on what the file says
        harness = HFLM(pretrained=str(tmp_path / "saved"), device="cpu", batch_size=1)
    harness.loglikelihood([Instance("loglikelihood", {}, ("Return", " the"), 0)], disable_tqdm=True)
    assert all(sum(calls.values()) > 0 for calls in w8a8.ledger(harness.model).values())


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


def bert_classifier():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = BertConfig(vocab_size=96, max_position_embeddings=64, **small)
    return BertForSequenceClassification(config).eval()
