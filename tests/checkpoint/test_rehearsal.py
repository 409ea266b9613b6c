"""The way to a saved directory, gone on a stand-in first."""

import re

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    MoshiConfig,
    MoshiForConditionalGeneration,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    NomicBertConfig,
    NomicBertModel,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
)

from tests.conftest import every_third, llama, opt
from tests.families import FAMILIES, build
from w8a8 import Scheme
from w8a8.checkpoint.rehearsal import rehearse
from w8a8.errors import CheckpointError

NOT_OURS = {"falcon", "falcon-new", "falcon-alibi"}  # their linear layers are a class of their own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", every_third(sorted(set(FAMILIES) - NOT_OURS)))
def test_every_family_has_a_stand_in_that_is_saved(tmp_path, name):
    assert rehearse(build(name), Scheme.of("w8a8"), tmp_path / "out") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-o3", "w8a16"])
def test_every_kind_of_scheme_is_saved(tmp_path, scheme):
    assert rehearse(opt(), Scheme.of(scheme), tmp_path / "out") is None
    assert not list(tmp_path.iterdir())


def test_what_fails_is_told_and_leaves_nothing(tmp_path):
    class Torn:
        def save_pretrained(self, directory):
            raise ValueError("this tokenizer has no files")

    model = llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM cannot be saved.*ValueError: this tokenizer has no"):
        rehearse(model, Scheme.of("w8a8"), tmp_path / "out", Torn())
    assert not list(tmp_path.iterdir())
    assert all((before[name] == t).all() for name, t in model.state_dict().items())


_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
UNCUT = {  # of one block their configs are refused: by a stage's name, by a kind of layer that is missing, by a field
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_SIZES, image_size=16, patch_size=4)),
    "olmo-hybrid": lambda: OlmoHybridForCausalLM(
        OlmoHybridConfig(
            **_SIZES, vocab_size=96, pad_token_id=0, eos_token_id=2, layer_types=["linear_attention", "full_attention"]
        )
    ),
    "nomic-bert": lambda: NomicBertModel(NomicBertConfig(**_SIZES, vocab_size=96)),
}


@pytest.mark.parametrize("name", UNCUT)
def test_a_model_that_cannot_be_cut_to_one_block_is_no_reason_to_stop(tmp_path, name):
    model = UNCUT[name]().eval()
    told = rehearse(model, Scheme.of("w8a8"), tmp_path / "out")
    assert re.fullmatch(rf"no {type(model).__name__} of one block can be made \(\w+Error: .*\)", told)
    assert not list(tmp_path.iterdir())


def moshi():
    """Whenever its config is read, that of its depth decoder gets its vocabulary."""
    ends = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "ffn_dim": 48}
    return MoshiForConditionalGeneration(
        MoshiConfig(
            **ends,
            vocab_size=96,
            num_codebooks=4,
            depth_decoder_config=dict(ends),
            audio_encoder_config=_AUDIO
            | {"model_type": "mimi", "vector_quantization_hidden_dimension": 8, "num_quantizers": 4}
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
            | {"intermediate_size": 16, "upsample_groups": 2},
        )
    ).eval()


def musicgen():
    """Both of its ends are of text, by the names of their configs."""
    ends = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 48}
    t5 = {"model_type": "t5", "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    codes = {"vocab_size": 16, "pad_token_id": 15, "bos_token_id": 15, "num_codebooks": 4}
    return MusicgenForConditionalGeneration(
        MusicgenConfig(
            text_encoder=t5,
            audio_encoder=_AUDIO | {"model_type": "encodec", "num_lstm_layers": 1, "upsampling_ratios": [2, 2]},
            decoder=ends | codes | {"model_type": "musicgen_decoder"},
        )
    ).eval()


_AUDIO = {"hidden_size": 16, "num_filters": 2, "codebook_size": 16, "codebook_dim": 8}


def test_a_stand_in_that_is_read_in_another_shape_is_no_reason_to_stop(tmp_path):
    told = rehearse(moshi(), Scheme.of("w8a8"), tmp_path / "out")
    assert told == "a MoshiForConditionalGeneration of one block is another model when it is read again"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_with_two_configs_of_text_has_a_stand_in(tmp_path):
    model = musicgen()
    assert rehearse(model, Scheme.of("w8a8"), tmp_path / "out") is None
    assert (model.config.text_encoder.num_layers, model.config.decoder.num_hidden_layers) == (2, 2)


def test_a_tokenizer_is_tried_where_there_is_no_stand_in(tmp_path):
    class Torn:
        def save_pretrained(self, directory):
            raise ValueError("this tokenizer has no files")

    with pytest.raises(CheckpointError, match=r"its tokenizer failed with ValueError: this tokenizer has no files"):
        rehearse(UNCUT["dinov2"]().eval(), Scheme.of("w8a8"), tmp_path / "out", Torn())


def test_every_list_that_says_of_each_layer_what_it_is_is_cut(tmp_path):
    config = AutoConfig.for_model(
        "cohere2_moe",
        **_SIZES,
        vocab_size=96,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse"],
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert rehearse(model, Scheme.of("w8a8"), tmp_path / "out") is None
    assert model.config.mlp_layer_types == ["dense", "sparse"]
