"""From files to files, a piece of a tensor at a time: the same bytes as in memory."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import w8a8
from tests.conftest import contents, crossed, gpt2, llama, logits, mixtral, named, nemotron_h, opt, qwen2_moe, qwen3_moe
from tests.streaming.conftest import saved, tensors
from w8a8.checkpoint.opening import open_model
from w8a8.core.scheme import PerGroup, QuantSpec, Scheme
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_memory(source, target, **options):
    model = open_model(source).model
    w8a8.quantize(model, **options)
    w8a8.save(model, target)
    return target


@crossed("make dtype", [llama, opt, gpt2], DTYPES, ids=named)
def test_the_result_is_that_of_the_model_in_memory(tmp_path, make, dtype):
    source = saved(make(), tmp_path / "source", dtype=dtype)
    streamed = quantize_directory(source, tmp_path / "streamed", shard_bytes=20_000)
    found, wanted = tensors(tmp_path / "streamed"), tensors(in_memory(source, tmp_path / "memory"))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor)
    assert streamed.shards == len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    ids = torch.arange(12)[None]
    assert torch.equal(*(logits(w8a8.load(tmp_path / name), ids) for name in ("streamed", "memory")))


@crossed("make scheme", [llama, opt, gpt2, mixtral, qwen3_moe], ["w8a8", "w8a8-asym", "w8a16"], ids=named)
def test_a_result_of_one_file_has_the_bytes_that_save_writes(tmp_path, make, scheme):
    source = saved(make(), tmp_path / "source", dtype=torch.bfloat16)
    quantize_directory(source, tmp_path / "streamed", scheme, head="int8")
    model = open_model(source).model
    result = w8a8.quantize(model, scheme, head="int8")
    w8a8.save(model, tmp_path / "memory", beside=source, covered=result.coverage)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def flava():
    """Its heads have biases that are those of their decoders, whose weights are their own."""
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.FlavaConfig(
        image_config={**part, "image_size": 16, "patch_size": 8, "vocab_size": 40},
        text_config={**part, "vocab_size": 96, "max_position_embeddings": 64},
        multimodal_config=part,
        image_codebook_config={"num_groups": 2, "hidden_size": 8, "vocab_size": 40, "num_blocks_per_group": 1},
        hidden_size=32,
        projection_dim=16,
    )
    return transformers.FlavaForPreTraining(config).eval()


@pytest.mark.parametrize("include", [["*"], ["mim_head.decoder", "mlm_head.transform.dense"]], ids=str)
def test_a_bias_that_was_that_of_another_module_is_there_twice_where_one_of_the_two_is_quantised(tmp_path, include):
    model = flava()
    with torch.no_grad():
        for head in (model.mim_head, model.mlm_head, model.mmm_image_head, model.mmm_text_head):
            head.bias.normal_()
    source = saved(model, tmp_path / "source")
    quantize_directory(source, tmp_path / "streamed", include=include)
    in_memory(source, tmp_path / "memory", include=include)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    found = tensors(tmp_path / "streamed")
    assert torch.equal(found["mim_head.bias"], model.mim_head.bias)
    assert torch.equal(found["mim_head.decoder.bias"], model.mim_head.bias)


@crossed(
    "make split include", [mixtral, qwen3_moe, qwen2_moe, nemotron_h], [True, False], [["*"], ["*.3.*"]], ids=named
)
def test_experts_become_what_they_become_in_memory(tmp_path, make, split, include):
    source = saved(make(), tmp_path / "source", save_original_format=split)
    streamed = quantize_directory(source, tmp_path / "streamed", shard_bytes=20_000, include=include)
    memory = in_memory(source, tmp_path / "memory", include=include)
    found, wanted = tensors(tmp_path / "streamed"), tensors(memory)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    assert told[0]["quantization_config"] == told[1]["quantization_config"]
    assert sum(".experts." in m.name for m in streamed.coverage.quantized) > 0
    ids = torch.arange(12)[None]
    assert torch.equal(*(logits(w8a8.load(tmp_path / name), ids) for name in ("streamed", "memory")))


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w8a8-asym"},
        {"scheme": "w8a8-o1"},
        {"scheme": "w8a16"},
        {"scheme": Scheme(QuantSpec(granularity=PerGroup(4)))},
        {"head": "int8"},
        {"include": ["*.mlp.*"], "exclude": ["*.1.*"]},
    ],
    ids=str,
)
def test_every_option_does_what_it_does_in_memory(tmp_path, options):
    source = saved(llama(tie_word_embeddings=True), tmp_path / "source")
    done = quantize_directory(source, tmp_path / "streamed", **options)
    model = open_model(source).model
    result = w8a8.quantize(model, **options)
    w8a8.save(model, tmp_path / "memory")
    found, wanted = tensors(tmp_path / "streamed"), tensors(tmp_path / "memory")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    pairs = zip(done.coverage.modules, result.coverage.modules, strict=True)
    assert all(replace(a, bytes=0) == replace(b, bytes=0) for a, b in pairs)  # in memory codes are packed and padded
    assert done.untied == result.untied
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    for key in ("quantization_config", "tie_word_embeddings"):
        assert configs[0][key] == configs[1][key]


@crossed("make scheme", [llama, gpt2], ["w8a8", "w8a16"], ids=named)
def test_a_weight_of_many_pieces_is_the_same(tmp_path, monkeypatch, make, scheme):
    source = saved(make(), tmp_path / "source", dtype=torch.float32)
    quantize_directory(source, tmp_path / "whole", scheme)
    monkeypatch.setattr("w8a8.streaming.plan.PIECE", 1000)
    quantize_directory(source, tmp_path / "pieces", scheme)
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


@crossed("make scheme", [llama, gpt2, mixtral, qwen3_moe], ["w8a8", "w8a8-asym", "w8a8-o1", "w8a16"], ids=named)
def test_what_weights_lost_is_what_they_lose_in_memory(tmp_path, monkeypatch, make, scheme):
    source = saved(make(), tmp_path / "source")
    result = w8a8.quantize(open_model(source).model, scheme)
    monkeypatch.setattr("w8a8.streaming.plan.PIECE", 1000)  # of several rows each
    done = quantize_directory(source, tmp_path / "out", scheme, shard_bytes=20_000)
    wanted = {m.name: m.weight_sqnr_db for m in result.coverage.quantized}
    found = {m.name: m.weight_sqnr_db for m in done.coverage.quantized}
    assert found == pytest.approx(wanted, rel=1e-9)
    assert all(30 < db < 60 for db in found.values())
    assert all(m.weight_sqnr_db is None for m in done.coverage.left)
    dry = quantize_directory(source, tmp_path / "dry", scheme, dry_run=True)
    assert all(m.weight_sqnr_db is None for m in dry.coverage.modules)


def test_names_without_the_base_models_prefix_are_found(tmp_path):
    source = saved(gpt2(), tmp_path / "source", shard="1GB")
    (path,) = source.glob("*.safetensors")
    without = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    save_file(without, path, metadata={"format": "pt"})
    quantize_directory(source, tmp_path / "streamed")
    assert tensors(tmp_path / "streamed").keys() == tensors(in_memory(source, tmp_path / "memory")).keys()


def test_what_lies_beside_goes_along_and_pickles_do_not(tmp_path):
    source = saved(llama(), tmp_path / "source")
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt"):
        (source / name).write_text("{}")
    for name in ("pytorch_model.bin", "modeling_x.py"):
        (source / name).write_text("never read")
    quantize_directory(source, tmp_path / "streamed")
    names = {path.name for path in (tmp_path / "streamed").iterdir()}
    beside = {"tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json", "modeling_x.py"}
    assert beside <= names  # code is kept, and run only where it is trusted
    assert "pytorch_model.bin" not in names


def test_a_link_that_leads_out_is_not_followed(tmp_path):
    source = saved(llama(), tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to .*secret, outside"):
        quantize_directory(source, tmp_path / "streamed")
    assert not (tmp_path / "streamed").exists()


def test_a_hub_snapshot_of_links_is_followed(tmp_path):
    real = saved(llama(), tmp_path / "models--x" / "blobs")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(path)
    quantize_directory(snapshot, tmp_path / "streamed")
    assert w8a8.load(tmp_path / "streamed")(torch.arange(5)[None]).logits.isfinite().all()
