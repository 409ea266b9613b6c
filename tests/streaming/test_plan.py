"""What becomes of every tensor is known from headers alone, and is what loading, quantising and saving make of it."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import w8a8
from tests.conftest import mixtral, opt, relative_error
from tests.streaming.conftest import saved
from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.files import CONFIG, SINGLE
from w8a8.checkpoint.opening import open_model
from w8a8.core.scheme import PerColumn, Scheme
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError, PatternError, SchemeError
from w8a8.model import experts
from w8a8.streaming.plan import PIECE, UnplacedError, make_plan

W8A8 = Scheme.of("w8a8")
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


def rewrite(source, change):
    """Change the tensors of a directory with one file."""
    held = load_file(source / SINGLE)
    change(held)
    save_file(held, source / SINGLE, metadata={"format": "pt"})


def reconfigure(source, **changes):
    config = json.loads((source / CONFIG).read_text())
    config |= changes
    (source / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def assert_as_in_memory(source, place):
    """Streaming makes the tensors that quantising in memory makes."""
    quantize_directory(source, place / "streamed", shard_bytes=10**6)
    model = open_model(source).model
    w8a8.quantize(model)
    w8a8.save(model, place / "memory")
    found, wanted = (load_file(place / name / SINGLE) for name in ("streamed", "memory"))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    return found


@pytest.fixture
def tied(tmp_path):
    opt().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("stated", ["bfloat16", "float16", "float32", None])
def test_values_are_cast_to_the_dtype_that_the_config_states_first(tmp_path, source, stated):
    reconfigure(source, dtype=stated)
    found = assert_as_in_memory(source, tmp_path)
    assert found["model.norm.weight"].dtype is getattr(torch, stated or "float32")


def test_a_file_of_float16_under_a_config_of_bfloat16_is_cast_piece_by_piece(tmp_path, source, monkeypatch):
    rewrite(source, lambda held: held.update({name: t.half() for name, t in held.items()}))
    reconfigure(source, dtype="bfloat16")
    for module in ("plan", "shard"):
        monkeypatch.setattr(f"w8a8.streaming.{module}.PIECE", 1000)
    assert_as_in_memory(source, tmp_path)


def test_what_an_architecture_keeps_in_float32_stays(tmp_path):
    config = T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, tie_word_embeddings=False)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    reconfigure(tmp_path / "source", dtype="float16")
    model = open_model(tmp_path / "source").model
    plan = make_plan(Directory.of(tmp_path / "source"), W8A8)
    dtypes = {step.place if step.spec is None else f"{step.place}.weight": step.dtype for step in plan.steps}
    held = model.state_dict()
    assert dtypes == {name: held[name].dtype for name in dtypes}
    assert set(dtypes.values()) == {torch.float16, torch.float32}


def test_the_dtype_that_is_told_is_that_of_the_first_float_parameter(tmp_path):
    """A file begins with its widest tensors, which are others: T5 keeps a layer in float32."""
    config = T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    source = saved(T5ForConditionalGeneration(config), tmp_path / "source", dtype=torch.float16, shard="5GB")
    wide = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    rewrite(source, lambda held: held.update({wide: held[wide].float()}))
    assert_as_in_memory(source, tmp_path)
    told = [json.loads((tmp_path / way / CONFIG).read_text()) for way in ("streamed", "memory")]
    assert told[0] == told[1]


def test_a_second_copy_of_a_tied_weight_is_dropped(tmp_path, tied):
    rewrite(tied, lambda held: held.update({HEAD: held[EMBEDDING].clone()}))
    found = assert_as_in_memory(tied, tmp_path)
    assert EMBEDDING in found
    assert HEAD not in found


def test_tied_weights_that_differ_are_left_to_transformers(tied):
    rewrite(tied, lambda held: held.update({HEAD: held[EMBEDDING] + 1}))
    with pytest.raises(UnplacedError, match=r"lm_head\.weight and .*embed_tokens\.weight are one weight by config"):
        make_plan(Directory.of(tied), W8A8)


def test_a_tied_head_that_is_named_is_quantised_whichever_name_the_files_have(tmp_path, tied):
    results = []
    for name in ("one", "two"):
        quantize_directory(tied, tmp_path / name, head="int8")
        results.append(load_file(tmp_path / name / SINGLE))
        assert json.loads((tmp_path / name / CONFIG).read_text())["tie_word_embeddings"] is False
        rewrite(tied, lambda held: held.update({HEAD: held[EMBEDDING].clone()}))
    assert results[0][HEAD].dtype is torch.int8
    assert results[0][EMBEDDING].dtype is torch.float32
    assert all(torch.equal(results[0][key], results[1][key]) for key in {**results[0], **results[1]})


def test_experts_that_are_to_stay_stacked_are_an_error_that_names_one(tmp_path):
    mixtral().save_pretrained(tmp_path / "source")  # under the names of the hub: an expert each
    with pytest.raises(UnplacedError, match=r"tensors have no place .*experts.*--no-stream"):
        make_plan(Directory.of(tmp_path / "source"), W8A8, exclude=["*.experts.*"])
    mixtral().save_pretrained(tmp_path / "stacked", save_original_format=False)
    plan = make_plan(Directory.of(tmp_path / "stacked"), W8A8, exclude=["*.experts.*"])
    assert "model.layers.0.mlp.experts.down_proj" in {step.name for step in plan.steps}


def test_a_stack_of_experts_is_ranges_of_its_bytes(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    steps = {step.place: step for step in make_plan(Directory.of(tmp_path / "stacked"), W8A8).steps}
    step = steps["model.layers.0.mlp.experts.2.w3"]
    assert (step.name, step.entry.shape) == ("model.layers.0.block_sparse_moe.experts.2.w3", (40, 32))
    octets = step.entry.file.read_bytes()[step.entry.begin : step.entry.end]
    want = model.model.layers[0].mlp.experts.gate_up_proj[2, 40:].detach().numpy().tobytes()
    assert octets == want


def test_a_stack_of_another_shape_is_refused(tmp_path):
    mixtral().save_pretrained(tmp_path / "source", save_original_format=False)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    rewrite(tmp_path / "source", lambda held: held.update({stack: held[stack][:3].clone()}))
    with pytest.raises(UnplacedError, match=r"gate_up_proj has shape \(3, 80, 32\), config.json says \(4, 80, 32\)"):
        make_plan(Directory.of(tmp_path / "source"), W8A8)


def test_an_expert_that_is_missing_or_there_twice_is_told(tmp_path):
    mixtral().save_pretrained(tmp_path / "source")
    one = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    rewrite(tmp_path / "source", lambda held: held.update({one.replace("block_sparse_moe", "mlp"): held[one] + 1}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2.*two values for one tensor"):
        make_plan(Directory.of(tmp_path / "source"), W8A8)
    rewrite(tmp_path / "source", lambda held: [held.pop(name) for name in list(held) if "experts.2.w2" in name])
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.layers\.0\.mlp\.experts\.2\.w2\.weight"):
        make_plan(Directory.of(tmp_path / "source"), W8A8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("model.norm.weight"), r"1 tensors are missing: model\.norm\.weight"),
        (lambda held: held.update({"model.norm.weight": torch.ones(7)}), r"has shape \(7,\), config.json says \(64,\)"),
        (
            lambda held: held.update({"model.odd": torch.ones(7)}),
            r"no place of their own in LlamaForCausalLM .*model.odd",
        ),
        (
            lambda held: held.update({HEAD.replace("lm_head", "norm"): held["model.norm.weight"].clone()}),
            r"norm\.weight is in model\.safetensors too: two values",
        ),
        (
            lambda held: held.update({"model.layers.0.mlp.up_proj.weight": torch.ones(100, 64, dtype=torch.int8)}),
            r"up_proj\.weight is torch\.int8, which is no weight of a float model",
        ),
    ],
)
def test_files_that_do_not_fit_the_config_are_refused(source, change, message):
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=message):
        make_plan(Directory.of(source), W8A8)


def test_a_request_that_cannot_be_met_is_refused(source):
    with pytest.raises(PatternError, match="matches none"):
        make_plan(Directory.of(source), W8A8, include=["*.nothing"])
    with pytest.raises(SchemeError, match="per-column weights"):
        make_plan(Directory.of(source), replace(W8A8, weights=replace(W8A8.weights, granularity=PerColumn())))


def test_a_quantised_directory_is_refused(tmp_path, source):
    quantize_directory(source, tmp_path / "out")
    with pytest.raises(SchemeError, match="is quantised already"):
        make_plan(Directory.of(tmp_path / "out"), W8A8)


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 10**9])
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(source, shard_bytes):
    plan = make_plan(Directory.of(source), W8A8, shard_bytes=shard_bytes)
    names = [name for shard in plan.shards for name, _, _ in shard.outputs]
    assert len(names) == len(set(names))
    assert [step.name for step in plan.steps] == [
        s.name for s in make_plan(Directory.of(source), W8A8, shard_bytes=10**9).steps
    ]
    for shard in plan.shards:
        assert sum(step.bytes for step in shard.steps) <= shard_bytes or len(shard.steps) == 1


def test_tensors_lie_aligned_in_the_files(tmp_path, source):
    quantize_directory(source, tmp_path / "out", shard_bytes=5_000)
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                assert tensor.data_ptr() % tensor.element_size() == 0


def test_pieces_are_whole_rows_and_make_up_the_tensor(source):
    for step in make_plan(Directory.of(source), W8A8).steps:
        wide = replace(step, entry=replace(step.entry, end=step.entry.begin + step.entry.bytes * 1000))
        pieces = list(wide.pieces())
        assert pieces[0][0] == wide.entry.begin
        assert pieces[-1][1] == wide.entry.end
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(pieces))
        if step.spec is not None:
            row = step.entry.shape[1] * step.entry.dtype.itemsize
            assert all((end - begin) % row == 0 and end - begin <= PIECE for begin, end in pieces)


def test_a_file_that_cannot_hold_so_many_experts_is_refused_before_any_is_made(tmp_path, monkeypatch):
    mixtral().save_pretrained(tmp_path / "source")
    reconfigure(tmp_path / "source", num_local_experts=10**6)

    made, linear = [], experts._linear
    monkeypatch.setattr(experts, "_linear", lambda *args, **options: made.append(1) or linear(*args, **options))
    with pytest.raises(CheckpointError, match="num_local_experts is 1000000, more than the files of this model can"):
        make_plan(Directory.of(tmp_path / "source"), W8A8)
    reconfigure(tmp_path / "source", num_local_experts=90)  # fewer than the vocabulary's rows, more than tensors
    with pytest.raises(CheckpointError):
        make_plan(Directory.of(tmp_path / "source"), W8A8)
    assert len(made) <= 3 * 4  # of the small instance that the class is tried on


class TestNamesThatTransformersRenames:
    def test_a_vision_model_is_streamed(self, tmp_path):
        vit().save_pretrained(tmp_path / "source")
        assert "vit.encoder.layer.0.attention.attention.key.weight" in load_file(tmp_path / "source" / SINGLE)
        found = assert_as_in_memory(tmp_path / "source", tmp_path)
        assert "vit.layers.0.attention.k_proj.weight_scale" in found
        quantize_directory(tmp_path / "source", tmp_path / "streamed", overwrite=True)
        assert (tmp_path / "streamed" / CONFIG).read_bytes() == (tmp_path / "memory" / CONFIG).read_bytes()

    def test_tables_of_old_files_are_left_out(self, tmp_path):
        bert().save_pretrained(tmp_path / "source")
        rewrite(tmp_path / "source", lambda held: held.update(OLD))
        found = assert_as_in_memory(tmp_path / "source", tmp_path)
        assert not set(found) & set(OLD)

    def test_what_the_class_does_without_is_told(self, source, monkeypatch):
        rewrite(source, lambda held: held.update({"mtp.0.weight": torch.ones(2)}))
        monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
        assert make_plan(Directory.of(source), W8A8).unwanted == ("mtp.0.weight",)


OLD = {"bert.embeddings.position_ids": torch.arange(64)[None]}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}


def vit():
    return ViTForImageClassification(ViTConfig(**_SMALL, image_size=32, patch_size=16)).eval()


def bert():
    return BertForMaskedLM(BertConfig(vocab_size=96, max_position_embeddings=64, **_SMALL)).eval()


class TestWhatAClassKeepsInFloat32:
    def source(self, tmp_path):
        config = T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
        reconfigure(tmp_path / "source", dtype="float16")
        return tmp_path / "source"

    def test_it_stays_float_and_coverage_says_why(self, tmp_path):
        model = T5ForConditionalGeneration.from_pretrained(self.source(tmp_path), dtype="auto")
        result = w8a8.quantize(model)
        name = "encoder.block.0.layer.1.DenseReluDense.wo"
        assert result.model.get_submodule(name).weight.dtype is torch.float32
        assert "keeps it in float32 beside float16" in str(result.coverage)
        assert any(layer.name.endswith(".wi") for layer in result.coverage.quantized)

    def test_sums_beyond_float16_are_as_right_as_those_of_the_float32_model(self, tmp_path):
        source = self.source(tmp_path)
        # what `wo` returns is then beyond 65504 at some places, where T5 clamps it if it is float16
        rewrite(source, lambda held: held.update({n: 1e5 * t for n, t in held.items() if n.endswith(".wo.weight")}))
        ids = torch.arange(12)[None]
        errors = {}
        for dtype in (torch.float32, torch.float16):
            model = T5ForConditionalGeneration.from_pretrained(source, dtype=dtype).eval()
            with torch.inference_mode():
                want = model(ids, decoder_input_ids=ids).logits.float()
                w8a8.quantize(model)
                errors[dtype] = relative_error(model(ids, decoder_input_ids=ids).logits.float(), want)
        assert errors[torch.float16] < 1.5 * errors[torch.float32] < 0.06

    def test_streaming_does_the_same(self, tmp_path):
        found = assert_as_in_memory(self.source(tmp_path), tmp_path)
        assert found["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype is torch.float32
        ids = torch.arange(12)[None]
        with torch.inference_mode():
            results = [w8a8.load(tmp_path / name)(ids, decoder_input_ids=ids).logits for name in ("streamed", "memory")]
        assert torch.equal(*results)
