"""What no file holds, and buffers of every kind: a loaded model has them as one that transformers loads."""

import pytest
import torch
from torch import nn
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
)

import w8a8
from tests.conftest import contents, llama, logits
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes)).eval()


def marian():
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 40}
    small = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in sizes.items()}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 0}
    return MarianMTModel(MarianConfig(vocab_size=96, d_model=32, max_position_embeddings=64, **small, **ids)).eval()


def codegen():
    config = CodeGenConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=512, rotary_dim=4)
    return CodeGenForCausalLM(config).to(torch.bfloat16).eval()


def mask2former():
    """Its heads for masks keep their layers in a plain list too, and call those."""
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages)
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}  # GroupNorm(32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32, "num_attention_heads": 2}
    few = {"num_queries": 5, "train_num_points": 10, "num_labels": 3}
    config = Mask2FormerConfig(backbone_config=swin, **widths, **layers, **few)
    return Mask2FormerForUniversalSegmentation(config).eval()


def buffers(model):
    return dict(model.named_buffers())


def test_batch_norm_counts_its_batches_in_int64_and_is_loaded(tmp_path):
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.fill_(2**40)
            module.running_mean.uniform_(-1, 1)
    w8a8.save(w8a8.quantize(model).model, tmp_path / "model")
    loaded = w8a8.load(tmp_path / "model")
    assert all(torch.equal(buffer, buffers(model)[name]) for name, buffer in buffers(loaded).items())
    with torch.inference_mode():
        assert torch.equal(loaded(x).logits, model(x).logits)


class WithBuffers(LlamaForCausalLM):
    """Buffers of the dtypes that files have."""

    def __init__(self, config):
        super().__init__(config)
        for dtype in DTYPES:
            self.register_buffer(f"of_{dtype}".replace("torch.", ""), torch.zeros(3, 2).to(dtype))


DTYPES = [torch.int64, torch.int16, torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.float64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


@pytest.fixture
def with_buffers(monkeypatch):
    monkeypatch.setattr("transformers.WithBuffers", WithBuffers, raising=False)
    model = WithBuffers(llama().config).eval()
    for dtype in DTYPES:
        getattr(model, f"of_{dtype}".replace("torch.", ""))[1] = 1
    return model


class TestBuffersOfEveryDtype:
    def test_what_save_writes_load_reads(self, tmp_path, with_buffers):
        w8a8.save(w8a8.quantize(with_buffers).model, tmp_path / "model")
        loaded = buffers(w8a8.load(tmp_path / "model"))
        for dtype in DTYPES:
            name = f"of_{dtype}".replace("torch.", "")
            assert loaded[name].dtype is dtype
            assert torch.equal(loaded[name].view(torch.uint8), buffers(with_buffers)[name].view(torch.uint8))

    @pytest.mark.parametrize("other", [torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)])
    def test_another_dtype_or_shape_is_refused(self, tmp_path, with_buffers, other):
        w8a8.quantize(with_buffers)
        with_buffers.of_int64 = other
        w8a8.save(with_buffers, tmp_path / "model", verify=False)
        with pytest.raises(CheckpointError, match=r"of_int64 is int\d\d of shape .*, expected int64 of shape \(3, 2\)"):
            w8a8.load(tmp_path / "model")


def test_what_the_class_does_not_save_is_made_anew(tmp_path):
    model = marian()
    model.save_pretrained(tmp_path / "float")
    result = w8a8.quantize(model)
    w8a8.save(model, tmp_path / "model", beside=tmp_path / "float", covered=result.coverage)
    loaded = w8a8.load(tmp_path / "model")
    found, wanted = (m.model.encoder.embed_positions.weight for m in (loaded, model))
    assert torch.equal(found, wanted)
    quantize_directory(tmp_path / "float", tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "model")


def test_tables_are_computed_as_transformers_computes_them(tmp_path):
    codegen().save_pretrained(tmp_path / "float")
    model = CodeGenForCausalLM.from_pretrained(tmp_path / "float", dtype="auto")
    w8a8.save(w8a8.quantize(model).model, tmp_path / "model")
    loaded, ids = w8a8.load(tmp_path / "model"), torch.arange(400)[None] % 96
    assert all(torch.equal(buffer, buffers(model)[name]) for name, buffer in buffers(loaded).items())
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_layers_that_are_in_a_list_too_are_loaded_into_both_places(tmp_path):
    model, x = mask2former(), torch.randn(1, 3, 64, 64)
    w8a8.save(w8a8.quantize(model).model, tmp_path / "model")
    with w8a8.enabled():
        of_transformers = type(model).from_pretrained(tmp_path / "model").eval()
    labels = {"mask_labels": [torch.ones(1, 64, 64)], "class_labels": [torch.tensor([1])]}  # a loss reads a buffer

    def outputs(of):
        torch.manual_seed(0)  # the loss is that of random points
        with torch.inference_mode():
            told = of(x, **labels)
        return told.masks_queries_logits, told.class_queries_logits, told.loss

    for loaded in (w8a8.load(tmp_path / "model"), of_transformers):
        assert all(torch.equal(buffer, buffers(model)[name]) for name, buffer in buffers(loaded).items())
        assert all(torch.equal(found, wanted) for found, wanted in zip(outputs(loaded), outputs(model), strict=True))
