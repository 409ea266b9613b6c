"""The names that files have: transformers' own renamings, there and back."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.core_model_loading import WeightRenaming

import w8a8
from tests.conftest import llama, mixtral, nemotron_h, phimoe, qwen3_moe
from w8a8.checkpoint.names import FileNames, remember
from w8a8.errors import CheckpointError
from w8a8.model.experts import unstacked
from w8a8.model.swapping import swap


def apart(model):
    swap(model, unstacked(model)[0])
    return model


def test_mixtrals_files_call_its_parts_otherwise():
    names = FileNames(apart(mixtral()))
    pairs = {
        "model.layers.0.mlp.experts.3.w1.weight_scale": "model.layers.0.block_sparse_moe.experts.3.w1.weight_scale",
        "model.layers.0.mlp.gate.weight": "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    }
    assert {name: names.in_file(name) for name in pairs} == pairs
    assert {names.in_model(name): name for name in pairs.values()} == pairs
    assert names.of_layer("model.layers.0.mlp.experts.3.w1") == "model.layers.0.block_sparse_moe.experts.3.w1"


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, phimoe, nemotron_h], ids=lambda make: make.__name__)
def test_the_names_are_those_that_transformers_writes_a_float_model_with(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    names = FileNames(apart(model))
    assert {names.in_file(name) for name in model.state_dict()} == set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, llama], ids=lambda make: make.__name__)
def test_every_other_model_keeps_its_names(make):
    names = FileNames(make())  # stacked, or without experts
    assert names.renamings == []
    assert all(names.in_file(name) == name == names.in_model(name) for name in make().state_dict())


def test_what_cannot_be_taken_back_is_not_renamed(monkeypatch):
    lossy = [WeightRenaming(r"\.(mlp|norm)\.", r".other.")]
    monkeypatch.setattr("w8a8.checkpoint.names.conversions", lambda *_, **__: lossy)
    assert FileNames(apart(mixtral())).renamings == []


def test_transformers_saves_what_we_do(tmp_path):
    model = w8a8.quantize(mixtral()).model
    remember(model)
    model.save_pretrained(tmp_path / "theirs")
    w8a8.save(model, tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    ids = torch.arange(12)[None]
    assert torch.equal(w8a8.load(tmp_path / "theirs")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("make", [llama, mixtral])
def test_no_weight_is_unpacked_for_the_sake_of_its_name(monkeypatch, make, scheme):
    model = w8a8.quantize(make(), scheme).model

    def state_dict(*args, **options):
        raise AssertionError("this has the values of all layers, in the file's form: the model a second time")

    monkeypatch.setattr(nn.Module, "state_dict", state_dict)
    expected = "block_sparse_moe.gate.weight" if make is mixtral else "mlp.gate.weight"
    assert FileNames(model).in_file("model.layers.0.mlp.gate.weight") == f"model.layers.0.{expected}"


_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}


def bert(kind=BertForSequenceClassification):
    return kind(BertConfig(vocab_size=96, max_position_embeddings=64, **_SMALL)).eval()


class TestWhatIsRead:
    def test_names_of_an_older_version_are_renamed(self):
        names = FileNames(ViTForImageClassification(ViTConfig(**_SMALL, image_size=32, patch_size=16)))
        old = "vit.encoder.layer.0.attention.attention.key.weight"
        assert names.in_model(old) == "vit.layers.0.attention.k_proj.weight"
        assert names.layers_of([old]) == {"vit.layers.0.attention.k_proj": old.removesuffix(".weight")}

    def test_its_own_names_are_left_as_they_are(self):
        model = bert()
        names = FileNames(model)
        assert all(names.in_model(name) == name for name in model.state_dict())

    @pytest.mark.parametrize(
        ("kind", "in_file", "in_model"),
        [
            (LlamaForCausalLM, "layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.weight_scale"),
            (LlamaModel, "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            (LlamaModel, "lm_head.weight", "lm_head.weight"),
        ],
    )
    def test_the_prefix_of_the_base_is_put_on_and_taken_off(self, kind, in_file, in_model):
        assert FileNames(kind(llama().config)).in_model(in_file) == in_model

    def test_a_table_that_the_model_makes_itself_is_ignored(self):
        names = FileNames(bert())
        assert names.ignored(names.in_model("bert.embeddings.position_ids"))
        assert not names.unwanted("bert.embeddings.position_ids")
        assert not names.ignored("bert.embeddings.positions")

    def test_what_a_class_does_without_is_told_from_the_tensors_name_alone(self):
        model = llama()
        model._keys_to_ignore_on_load_unexpected = {"mtp.*"}
        names = FileNames(model)
        assert names.ignored("mtp.0.weight")
        assert names.unwanted("mtp.0.weight")
        assert not names.ignored("model.bogus.weight")


def test_a_directory_whose_path_matches_lets_nothing_in(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ["^mtp"])
    model = w8a8.quantize(llama()).model
    for place in ("mtp.old", "other"):
        w8a8.save(model, tmp_path / place)
        path = tmp_path / place / "model.safetensors"
        save_file(load_file(path) | {"model.bogus.weight": torch.ones(2)}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.bogus\.weight has no place in LlamaForCausalLM"):
            w8a8.load(tmp_path / place)


def test_a_tied_head_is_ignored_under_the_name_that_files_would_have_for_it(tmp_path, monkeypatch):
    renamed = [WeightRenaming(r"^head\.", r"lm_head.")]
    monkeypatch.setattr("w8a8.checkpoint.names.conversions", lambda *_, **__: renamed)
    model = w8a8.quantize(mixtral(tie_word_embeddings=True)).model
    assert "head" in model.config.quantization_config["ignore"]
    w8a8.save(model, tmp_path / "model")
    loaded = w8a8.load(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_what_is_left_out_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ["^mtp"])
    model = llama()
    w8a8.save(w8a8.quantize(model).model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"mtp.0.weight": torch.ones(2)}, path, {"format": "pt"})
    w8a8.load(tmp_path / "model")
    assert "LlamaForCausalLM does without 1 tensor: mtp.0.weight" in caplog.text
    model = llama()
    model.save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "model.safetensors"
    save_file(load_file(path) | {"mtp.1.weight": torch.ones(2)}, path, {"format": "pt"})
    w8a8.load(tmp_path / "float")
    assert "LlamaForCausalLM does without 1 tensor: mtp.1.weight" in caplog.text


def test_the_base_of_a_task_model_is_loaded_from_files_of_its_own_names(tmp_path):
    model = w8a8.quantize(bert(BertModel)).model
    w8a8.save(model, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({f"bert.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    ids = torch.arange(12)[None]
    assert torch.equal(w8a8.load(tmp_path / "base")(ids).pooler_output, model(ids).pooler_output)
