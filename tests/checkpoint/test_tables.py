"""Lookup tables in int8 in files: ours in transformers and here, others' here, and every way to write them."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

import w8a8
from tests.conftest import llama, opt
from w8a8 import PerChannel, PerGroup, QuantEmbedding, QuantSpec, W8A8Config
from w8a8.checkpoint.vllm import foresee, foresee_as_it_is
from w8a8.core.affine import dequantize, quantize
from w8a8.core.packed import SHAPE, WORDS, pack_rows
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError, FormatError, ModelError, SchemeError
from w8a8.jobs.quantization import quantize_to
from w8a8.jobs.request import Job
from w8a8.layers.buffers import quant_layers
from w8a8.model.choice import Choice

IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
WORDS_TABLE = "embeddings.word_embeddings"


WRITTEN = [
    (4, PerGroup(8)),
    *(pytest.param(8, shared, marks=pytest.mark.slow) for shared in (PerChannel(), PerGroup(8))),
]


def bert(**more):
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL, max_position_embeddings=16, **more)).eval()


def bart():
    sizes = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    wide = {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=32, max_position_embeddings=16, **sizes, **wide)
    ).eval()


def tied():
    return llama(tie_word_embeddings=True)


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    found = model(input_ids=IDS, **more)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def tables(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantEmbedding)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantised encoder and its directory."""
    model, place = bert(), tmp_path_factory.mktemp("made") / "out"
    w8a8.quantize(model, "w8a8", embeddings="int8")
    w8a8.save(model, place)
    return model, place


@pytest.fixture
def edited(made, tmp_path):
    """What makes a directory of the same with other tensors or another group of tables."""

    def write(group=None, ignore=(), **tensors):
        config = json.loads((made[1] / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_1"] |= group or {}
        config["quantization_config"]["ignore"] += ignore
        held = load_file(made[1] / "model.safetensors")
        for key, value in tensors.items():
            name = f"{WORDS_TABLE}.{key}"
            held = {k: v for k, v in held.items() if k != name} | ({} if value is None else {name: value})
        save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


class TestOurs:
    def test_the_file_has_codes_and_scales_and_says_so(self, made):
        _, place = made
        held = load_file(place / "model.safetensors")
        assert held[f"{WORDS_TABLE}.weight"].dtype is torch.int8
        assert held[f"{WORDS_TABLE}.weight_scale"].shape == (64, 1)
        config = json.loads((place / "config.json").read_text())["quantization_config"]
        assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"], ["Embedding"]]
        assert config["config_groups"]["group_1"]["input_activations"] is None
        assert config["format"] == "int-quantized"
        assert "lookup table in int8" in (place / "README.md").read_text()

    def test_it_loads_to_the_same_bits(self, made):
        model, place = made
        again = w8a8.load(place)
        assert tables(again).keys() == tables(model).keys()
        assert torch.equal(outputs(again), outputs(model))

    def test_transformers_runs_it_in_int8_where_it_is_enabled(self, made):
        model, place = made
        with w8a8.enabled():
            again = AutoModel.from_pretrained(place)
        assert torch.equal(outputs(again), outputs(model))

    def test_save_pretrained_writes_the_same(self, made, tmp_path):
        model, place = made
        model.save_pretrained(tmp_path / "asked")
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
        wanted = load_file(place / "model.safetensors")
        for name in ("asked", "given"):
            found = load_file(tmp_path / name / "model.safetensors")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
            assert torch.equal(outputs(w8a8.load(tmp_path / name)), outputs(model))

    def test_a_table_that_stays_float_is_told_to_others(self, tmp_path):
        model = bert()
        w8a8.quantize(model, "w8a8", embeddings="int8", exclude=["*position*"])
        w8a8.save(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["ignore"] == ["embeddings.position_embeddings"]
        assert torch.equal(outputs(w8a8.load(tmp_path / "out")), outputs(model))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("make", [bert, tied, opt, bart, lambda: bert(dtype=torch.bfloat16)])
    def test_transformers_reads_the_very_values(self, tmp_path, make):
        from compressed_tensors.compressors import base

        if nn.Embedding not in getattr(base, "COMPRESSIBLE_MODULE_TYPES", ()):
            pytest.skip("this compressed-tensors has no embeddings")
        model = make()
        head = "float" if isinstance(model, BertModel) else "int8"
        w8a8.quantize(model, "w8a16", embeddings="int8", head=head)
        w8a8.save(model, tmp_path / "out")
        theirs = type(model).from_pretrained(tmp_path / "out")
        found = outputs(theirs)
        for name, table in tables(model).items():
            assert torch.equal(theirs.get_submodule(name).weight, table.dequantized_weight().to(model.dtype))
        assert (found - outputs(model)).norm() <= 1e-2 * found.norm()


class TestOthers:
    """What llm-compressor writes: `pack-quantized`, of 8 or 4 bits, per channel or in groups, or as int8."""

    @pytest.mark.parametrize(("bits", "granularity"), WRITTEN)
    def test_words_are_read(self, edited, bits, granularity):
        spec = QuantSpec(bits, granularity)
        weight = bert().embeddings.word_embeddings.weight.detach()
        q = quantize(weight, spec)
        packed = pack_rows(q.codes)
        if bits == 4:
            pairs = (q.codes + 8).to(torch.uint8).view(64, 16, 2)
            packed = (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)
        tensors = {WORDS: packed, SHAPE: torch.tensor([64, 32]), "weight_scale": q.scale, "weight": None}
        size = getattr(granularity, "size", None)
        args = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "group_size": size}
        args["strategy"] = "channel" if size is None else "group"
        ours = [f"embeddings.{what}_embeddings" for what in ("position", "token_type")]
        place = edited({"format": "pack-quantized", "weights": args, "targets": ["re:.*word_embeddings$"]}, **tensors)
        config = json.loads((place / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"]
        eight = args | {"num_bits": 8, "strategy": "channel", "group_size": None}
        groups["group_2"] = {"targets": ours, "format": "int-quantized", "weights": eight}
        (place / "config.json").write_text(json.dumps(config))
        again = w8a8.load(place)
        assert torch.equal(again.embeddings.word_embeddings.dequantized_weight(), dequantize(q))
        with w8a8.enabled():
            enabled = AutoModel.from_pretrained(place)
        assert torch.equal(outputs(enabled), outputs(again))
        w8a8.save(again, place / "again")
        assert torch.equal(outputs(w8a8.load(place / "again")), outputs(again))

    @pytest.mark.slow
    def test_tables_alone_may_be_quantised(self, edited, made):
        place = edited()
        config = json.loads((place / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"]
        config["quantization_config"]["config_groups"] = {"group_0": groups["group_1"]}
        (place / "config.json").write_text(json.dumps(config))
        model = bert()
        held = {k: v for k, v in model.state_dict().items() if "_embeddings" not in k}
        held |= {k: v for k, v in load_file(made[1] / "model.safetensors").items() if "_embeddings" in k}
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})
        again = w8a8.load(place)
        assert len(tables(again)) == 3
        assert (outputs(again) - outputs(model)).norm() < 0.02 * outputs(model).norm()
        w8a8.save(again, place / "again")
        assert torch.equal(outputs(w8a8.load(place / "again")), outputs(again))

    @pytest.mark.parametrize(
        ("tensors", "why"),
        [
            ({"weight_scale": None}, "expected float values"),
            ({"weight_scale": -torch.ones(64, 1)}, "not positive and finite"),
            ({"weight_scale": torch.ones(32, 1)}, "expected shape"),
            ({"weight": torch.ones(64, 32)}, "expected int8"),
            ({"weight": torch.ones(60, 32, dtype=torch.int8)}, "expected shape"),
        ],
    )
    def test_what_is_wrong_is_named(self, edited, tensors, why):
        with pytest.raises(CheckpointError, match=why):
            w8a8.load(edited(**tensors))

    def test_scales_of_a_float_table_are_an_error(self, edited):
        place = edited(ignore=[WORDS_TABLE], weight=torch.ones(64, 32))
        with pytest.raises(CheckpointError, match="belongs to a layer that is float"):
            w8a8.load(place)

    def test_a_table_with_activations_is_refused(self, edited):
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        with pytest.raises((SchemeError, FormatError), match="a table is looked up by ids"):
            w8a8.load(edited({"input_activations": activations}))

    @pytest.mark.slow
    def test_what_is_no_plain_table_is_refused_with_the_reason(self, tmp_path):
        model = opt(tie_word_embeddings=False)
        w8a8.quantize(model, "w8a8", embeddings="int8")
        w8a8.save(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        config["quantization_config"]["ignore"] = ["lm_head"]
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        assert len(tables(w8a8.load(tmp_path / "out"))) == 1  # the files have floats of the other
        held, name = load_file(tmp_path / "out" / "model.safetensors"), "model.decoder.embed_positions.weight"
        held |= {name: held[name].to(torch.int8), f"{name}_scale": torch.ones(len(held[name]), 1)}
        save_file(held, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="embed_positions is quantised, and cannot be looked up in int8 here"):
            w8a8.load(tmp_path / "out")


class TestEveryWay:
    @pytest.mark.parametrize(
        "make", [bert, *(pytest.param(make, marks=pytest.mark.slow) for make in (tied, opt, bart))]
    )
    def test_while_it_is_loaded_and_from_files_to_files_it_is_what_quantize_makes(self, tmp_path, make):
        model = make().eval()
        model.save_pretrained(tmp_path / "float")
        options = {"embeddings": "int8", "head": "float" if isinstance(model, BertModel) else "int8"}
        w8a8.quantize(model, "w8a8", **options)
        wanted = outputs(model)
        quantize_directory(tmp_path / "float", tmp_path / "streamed", "w8a8", **options)
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=W8A8Config("w8a8", **options))
        w8a8.save(loaded, tmp_path / "loaded")
        for again in (loaded, w8a8.load(tmp_path / "streamed"), w8a8.load(tmp_path / "loaded")):
            assert tables(again).keys() == tables(model).keys()
            assert torch.equal(outputs(again), wanted)
            shared = [table.packed_weight is not None for table in tables(again).values()]
            assert shared == [table.packed_weight is not None for table in tables(model).values()]

    @pytest.mark.slow
    @pytest.mark.parametrize("smooth", ["none", "searched"])
    def test_block_by_block_with_data(self, tmp_path, smooth):
        model = tied().eval()
        model.save_pretrained(tmp_path / "float")
        options = {"embeddings": "int8", "head": "int8", "calibration": IDS, "smooth": smooth}
        quantize_directory(tmp_path / "float", tmp_path / "out", "w8a8-static", **options)
        w8a8.quantize(model, "w8a8-static", **options)
        if smooth == "none":
            assert torch.equal(outputs(w8a8.load(tmp_path / "out")), outputs(model))
        again = w8a8.load(tmp_path / "out")
        table, head = again.get_input_embeddings(), again.get_output_embeddings()
        name = "weight" if head.packed_weight is None else "packed_weight"
        assert table._buffers[name] is head._buffers[name]

    def test_as_a_directory_is_loaded(self, made, tmp_path):
        model = bert()
        w8a8.quantize(model, "w8a8")
        w8a8.save(model, tmp_path / "out")
        assert torch.equal(outputs(w8a8.load(tmp_path / "out", embeddings="int8")), outputs(made[0]))
        assert torch.equal(outputs(w8a8.load(made[1], embeddings="int8")), outputs(made[0]))
        with w8a8.enabled(embeddings="int8"):
            assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "out")), outputs(made[0]))

    def test_a_float_directory_is_not_quantised_so(self, tmp_path):
        bert().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"embeddings='int8' was asked for, but .* holds a float model"):
            w8a8.load(tmp_path, embeddings="int8")
        with pytest.raises(ModelError, match="embeddings='int4' is unknown"):
            W8A8Config(embeddings="int4")

    @pytest.mark.parametrize("stream", [None, pytest.param(False, marks=pytest.mark.slow)])
    def test_as_a_job(self, made, tmp_path, stream):
        bert().save_pretrained(tmp_path / "float")
        job = Job(str(tmp_path / "float"), tmp_path / "out", "w8a8", embeddings="int8", stream=stream)
        done = quantize_to(job)
        assert {m.name for m in done.coverage.quantized} >= tables(made[0]).keys()
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert torch.equal(outputs(w8a8.load(tmp_path / "out")), outputs(made[0]))
        found, wanted = (load_file(each / "model.safetensors") for each in (tmp_path / "out", made[1]))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_vllm_refuses_it_before_and_after(made, tmp_path):
    before = foresee(Choice.of(bert(), "w8a8", embeddings="int8"))
    after = foresee_as_it_is(made[0])
    for found in (before, after):
        (told,) = [finding for finding in found if finding.what == "a lookup table in int8"]
        assert told.refused
        assert WORDS_TABLE in told.layers
    bert().save_pretrained(tmp_path / "float")
    with pytest.raises(SchemeError, match="a lookup table in int8"):
        quantize_to(Job(str(tmp_path / "float"), tmp_path / "out", "w8a8", embeddings="int8", target="vllm"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_excluded_table_is_copied_by_every_way(tmp_path):
    bert().save_pretrained(tmp_path / "float")
    options = {"embeddings": "int8", "exclude": ["*position*"]}
    quantize_directory(tmp_path / "float", tmp_path / "streamed", "w8a8", **options)
    loaded = AutoModel.from_pretrained(tmp_path / "float", quantization_config=W8A8Config("w8a8", **options))
    assert torch.equal(outputs(loaded), outputs(w8a8.load(tmp_path / "streamed")))
    assert len(tables(loaded)) == 2


def test_a_pattern_for_tables_and_layers_keeps_both_float_while_a_model_is_loaded(tmp_path):
    bert().save_pretrained(tmp_path)
    options = {"embeddings": "int8", "exclude": ["*po*"]}  # positions, and the pooler
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=W8A8Config("w8a8", **options))
    found = {name for name, _ in quant_layers(loaded)}
    assert found == {module.name for module in w8a8.quantize(bert(), "w8a8", **options).coverage.quantized}
    assert not found & {"pooler.dense", "embeddings.position_embeddings"}


def test_which_tables_are_too_small_does_not_depend_on_when_a_tied_head_is_quantised(tmp_path):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 6}
    model = BertForMaskedLM(BertConfig(vocab_size=4000, hidden_size=16, **small)).eval()
    model.save_pretrained(tmp_path)  # its positions are 1.4 thousandths, and 0.7 with a head apart
    options = {"embeddings": "int8", "head": "int8"}
    loaded = BertForMaskedLM.from_pretrained(tmp_path, quantization_config=W8A8Config("w8a8", **options))
    w8a8.quantize(model, "w8a8", **options)
    assert tables(loaded).keys() == tables(model).keys() >= {"bert.embeddings.position_embeddings"}
