"""Inputs of pictures and sound that models take, and what is timed with them."""

import pytest
import torch
import transformers as t

from tests.sentences import bert
from w8a8.errors import ModelError
from w8a8.evaluation.samples import random_inputs
from w8a8.evaluation.speed import measure_speed

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WHISPER = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "vocab_size": 99}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "decoder_layers": 1}

MODELS = {
    "a square": (lambda: t.ViTModel(t.ViTConfig(**SMALL, image_size=16, patch_size=8)), (3, 16, 16)),
    "one channel": (
        lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL, image_size=16, patch_size=8, num_channels=1)),
        (1, 16, 16),
    ),
    "mel bands by frames": (
        lambda: t.WhisperForAudioClassification(
            t.WhisperConfig(**WHISPER, **TOKENS, num_mel_bins=8, max_source_positions=20, decoder_ffn_dim=16)
        ),
        (8, 40),
    ),
    "frames by mel bands": (
        lambda: t.ASTModel(t.ASTConfig(**SMALL, patch_size=4, num_mel_bins=8, max_length=40)),
        (40, 8),
    ),
    "samples": (
        lambda: t.Wav2Vec2Model(
            t.Wav2Vec2Config(
                **SMALL, conv_dim=(8, 8), conv_stride=(40, 8), conv_kernel=(40, 8), num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
            )
        ),
        (16000,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_what_is_made_for_it(name):
    make, shape = MODELS[name]
    model = make().eval()
    inputs = random_inputs(model, 3, seed=1)
    assert [tuple(tensor.shape) for tensor in inputs.values()] == [(3, *shape)]
    assert torch.equal(inputs[model.main_input_name], random_inputs(model, 3, seed=1)[model.main_input_name])


def test_what_takes_none_of_the_sizes_is_told_which_were_tried():
    model = MODELS["a square"][0]()
    model.config.image_size = 15
    with pytest.raises(ModelError, match=r"takes no pixel_values of \[2, 3, 15, 15\], \[2, 3, 224, 224\]"):
        random_inputs(model, 2)


def test_pictures_a_second_are_counted_and_nothing_else_is_timed_beside_them():
    vit = MODELS["a square"][0]().eval()
    (found,) = measure_speed({"vit": vit}, batch=4, seconds=0.0).values()
    assert (found.unit, found.writing) == ("pictures", None)
    assert found.reading.median > 0
    with pytest.raises(ModelError, match="vit reads pictures, bert reads tokens: time models that read the same"):
        measure_speed({"vit": vit, "bert": t.BertModel(bert())}, seconds=0.0)
    with pytest.raises(ModelError, match=r"vit reads pictures: .* without --prompt"):
        measure_speed({"vit": vit}, prompt=8, seconds=0.0)
    with pytest.raises(ModelError, match="T5Model is an encoder-decoder"):
        measure_speed({"t5": t.T5Model(t.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))})
