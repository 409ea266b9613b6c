"""What kind of model it is, by its class and config alone."""

import pytest
import transformers as t
from torch import nn

from tests.conftest import llama
from w8a8.core.scheme import PRESETS
from w8a8.errors import ModelError
from w8a8.model.kinds import (
    READS_TEXT,
    Asked,
    Kind,
    check_served,
    context_length,
    input_config,
    kind_of,
    kind_of_model,
    output_config,
)
from w8a8.model.selection import scheme_of

CLASSES = [
    (t.LlamaForCausalLM, t.LlamaConfig, Kind.CAUSAL),
    (t.GPT2LMHeadModel, t.GPT2Config, Kind.CAUSAL),
    (t.BartForCausalLM, t.BartConfig, Kind.CAUSAL),
    (t.LlavaForConditionalGeneration, t.LlavaConfig, Kind.CAUSAL),  # text alone is enough for it
    (t.BertForMaskedLM, t.BertConfig, Kind.MASKED),
    (t.XLMWithLMHeadModel, t.XLMConfig, Kind.MASKED),
    (t.BertModel, t.BertConfig, Kind.TEXT),
    (t.DistilBertForSequenceClassification, t.DistilBertConfig, Kind.TEXT),
    (t.T5EncoderModel, t.T5Config, Kind.TEXT),
    (t.T5ForConditionalGeneration, t.T5Config, Kind.PAIRED),
    (t.BartForConditionalGeneration, t.BartConfig, Kind.PAIRED),
    (t.WhisperForConditionalGeneration, t.WhisperConfig, Kind.PAIRED),
    (t.ViTModel, t.ViTConfig, Kind.VISION),
    (t.ConvNextForImageClassification, t.ConvNextConfig, Kind.VISION),
    (t.Wav2Vec2ForCTC, t.Wav2Vec2Config, Kind.SOUND),
    (t.CLIPModel, t.CLIPConfig, Kind.OTHER),
]


@pytest.mark.parametrize(("kind", "config", "expected"), CLASSES, ids=[kind.__name__ for kind, _, _ in CLASSES])
def test_the_kind_of_a_class(kind, config, expected):
    assert kind_of(kind, config()) is expected


def _two_ends():
    """Configs of composite models, and the names of the parts that say of ids and of predictions; "" is the whole."""
    bert, t5 = t.BertConfig(vocab_size=90), {"model_type": "t5", "vocab_size": 90}
    music = {"audio_encoder": {"model_type": "encodec"}, "decoder": {"model_type": "musicgen_decoder"}}
    yield t.EncoderDecoderConfig(encoder=bert, decoder=t.BertConfig(vocab_size=80)), "encoder", "decoder"
    yield t.MusicgenConfig(text_encoder=t5, **music), "text_encoder", "decoder"
    yield t.T5GemmaConfig(), "encoder", "decoder"
    yield t.T5Gemma2Config(), "encoder.text_config", "decoder"
    yield t.VisionEncoderDecoderConfig(encoder=t.ViTConfig(), decoder=bert), "decoder", "decoder"
    yield t.Florence2Config(), "text_config", "text_config"
    yield t.LlavaConfig(), "text_config", "text_config"
    yield t.BartConfig(), "", ""
    yield t.LlamaConfig(), "", ""


@pytest.mark.parametrize(("config", "read", "written"), list(_two_ends()), ids=lambda v: getattr(v, "model_type", v))
def test_ids_are_of_the_encoder_and_predictions_of_the_decoder(config, read, written):
    for found, path in ((input_config(config), read), (output_config(config), written)):
        expected = config
        for name in filter(None, path.split(".")):
            expected = getattr(expected, name)
        assert found is expected


def test_a_config_that_is_none_of_transformers_is_its_own_part():
    config = object()
    assert input_config(config) is config is output_config(config)


def test_a_model_that_is_none_of_transformers_has_no_kind():
    assert kind_of_model(llama()) is Kind.CAUSAL
    assert kind_of_model(object()) is None


_BERT = t.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
_VIT = t.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
USUAL = {
    "a classifier": (lambda: t.BertForSequenceClassification(_BERT), "w8a8-asym"),
    "masked": (lambda: t.BertForMaskedLM(_BERT), "w8a8-asym"),
    "of pictures": (lambda: t.ViTModel(_VIT), "w8a8-asym"),
    "an encoder in something": (lambda: nn.Sequential(t.BertModel(_BERT), nn.Linear(8, 8)), "w8a8-asym"),
    "a decoder": (llama, "w8a8"),
    "a decoder and an encoder": (lambda: nn.ModuleList([llama(), t.BertModel(_BERT)]), "w8a8"),
    "none of transformers": (lambda: nn.Sequential(nn.Linear(8, 8)), "w8a8"),
}


@pytest.mark.parametrize(("make", "usual"), USUAL.values(), ids=USUAL)
def test_the_scheme_that_is_usual_follows_from_what_the_model_is(make, usual):
    model = make()
    assert scheme_of(model) == PRESETS[usual].scheme
    for asked in ("w8a8-static", {"*": None}, PRESETS["w8a16"].scheme):
        assert scheme_of(model, asked) is asked


def test_what_is_no_module_has_no_usual_scheme():
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        scheme_of(3)


def test_what_is_asked_of_another_kind_is_an_error_with_the_way_out():
    assert Asked("it", READS_TEXT).check(t.BertModel, t.BertConfig()) is Kind.TEXT
    with pytest.raises(
        ModelError,
        match=r"^a perplexity was asked for, and ViTModel is a model of pictures: that takes a causal language model; "
        r"in Python, w8a8\.evaluation\.outputs\.compare_outputs",
    ):
        Asked("a perplexity").check(t.ViTModel, t.ViTConfig())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (t.LlamaForCausalLM, t.LlamaConfig),
        (t.LlavaForConditionalGeneration, t.LlavaConfig),
        (t.Blip2ForConditionalGeneration, t.Blip2Config),  # told by its pictures, asked by text
        (t.WhisperForConditionalGeneration, t.WhisperConfig),  # writes down what it hears
    ],
)
def test_what_writes_text_is_served(kind, config):
    check_served(kind, config())


@pytest.mark.parametrize(
    ("kind", "config"),
    [(t.BertForMaskedLM, t.BertConfig), (t.T5ForConditionalGeneration, t.T5Config), (t.ViTModel, t.ViTConfig)],
)
def test_what_does_not_is_no_model_for_a_server(kind, config):
    with pytest.raises(ModelError, match=f"^serving was asked for, and {kind.__name__} is a"):
        check_served(kind, config())


def test_the_context_of_a_nested_config_is_that_of_its_text():
    class Model:
        config = t.LlavaConfig(text_config={"model_type": "llama", "max_position_embeddings": 77})

    assert context_length(Model()) == 77
