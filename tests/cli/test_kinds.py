"""What a command says to a model that is not of the kind that it asks for, and what it does for encoders."""

import json

import pytest
import transformers as t

from tests.cli.test_commands import call, text  # noqa: F401 - fixtures
from w8a8.demo.run import demo_model

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}


def _bert(vocabulary):
    return t.BertConfig(**_SIZES, vocab_size=vocabulary, max_position_embeddings=64)


def _t5(vocabulary):
    return t.T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)


MODELS = {
    "masked": lambda v: t.BertForMaskedLM(_bert(v)),
    "encoder": lambda v: t.BertModel(_bert(v)),
    "classifier": lambda v: t.BertForSequenceClassification(_bert(v)),
    "paired": lambda v: t.T5ForConditionalGeneration(_t5(v)),
    "vision": lambda v: t.ViTForImageClassification(t.ViTConfig(**_SIZES, image_size=16, patch_size=4)),
    "not-causal": lambda v: t.BertLMHeadModel(_bert(v)),
}
SAYS = {
    "masked": "is a masked language model",
    "encoder": "is a model that reads text and predicts no tokens",
    "classifier": "is a model that reads text and predicts no tokens",
    "paired": "is an encoder-decoder",
    "vision": "is a model of pictures",
}
READING = ("masked", "encoder", "classifier", "vision")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A float directory of each kind, with a tokenizer that has a mask and special tokens."""
    place, tokenizer = tmp_path_factory.mktemp("kinds"), demo_model().tokenizer
    tokenizer = t.AutoTokenizer.from_pretrained(demo_model().directory)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for name, make in MODELS.items():
        make(len(tokenizer)).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("generate", ["Once"]),
        ("study", ["--text", "TEXT"]),
        ("bench", ["--seconds", "0"]),
        ("eval", ["--tasks", "wikitext"]),
        ("serve", ["--port", "0"]),
    ],
)
def test_what_takes_a_causal_language_model_says_what_it_found(call, models, text, tmp_path, kind, command, more):  # noqa: F811
    if (command, kind) == ("serve", "classifier") or (command == "bench" and kind in READING):
        pytest.skip("it is one of those that the command takes")
    places = {"TEXT": str(text), "OUT": str(tmp_path / "out"), "OUT.html": str(tmp_path / "out.html")}
    code, out, err = call(command, models / kind, *[places.get(part, part) for part in more])
    assert (code, out) == (2, "")
    assert SAYS[kind] in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["paired", "vision"])
@pytest.mark.parametrize(
    "more", [["--calib"], ["--eval-text"], ["--budget", "1MB", "--text"], ["--report", "page.html", "--eval-text"]]
)
def test_text_is_for_models_that_read_it_alone(call, models, text, tmp_path, kind, more):  # noqa: F811
    code, _, err = call("quantize", models / kind, "-o", tmp_path / "out", *more, text)
    assert code == 2
    assert SAYS[kind] in err
    assert "w8a8.evaluation.outputs.compare_outputs" in err
    for command in ("eval", "sensitivity"):
        code, _, err = call(command, models / kind, "--text", text)
        assert code == 2
        assert SAYS[kind] in err


def test_what_sees_the_token_that_it_is_to_tell_has_no_perplexity(call, models, text):  # noqa: F811
    code, _, err = call("eval", models / "not-causal", "--text", text, "--max-tokens", 32)
    assert code == 2
    assert "the perplexity of BertLMHeadModel was asked for, and what it says of a token depends on that token" in err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_what_quantize_advises_works_for_the_model(call, models, text, tmp_path, kind):  # noqa: F811
    code, out, err = call("quantize", models / kind, "-o", tmp_path / "out")
    assert code == 0, err
    advice = next(line for line in out.splitlines() if "what it lost: " in line).partition("what it lost: ")[2]
    if kind in ("paired", "vision"):
        assert (
            advice == "in Python, w8a8.evaluation.outputs.compare_outputs(model, float_model, batches) tells what "
            "quantising changed"
        )
        return
    if kind == "not-causal":  # seen when it runs
        return
    arguments = [str(text) if part == "FILE" else part for part in advice.split()[1:]]
    code, out, err = call(*arguments, "--max-tokens", 40, "--json")
    assert code == 0, err
    told = json.loads(out)
    if kind == "masked":
        assert told["model"]["pseudo"]
        assert told["model"]["tokens"] == 40
        assert told["top1_agreement"]["mean"] > 0.8
        assert told["layers"]
    else:
        assert told["output"] == {"encoder": "last_hidden_state", "classifier": "logits"}[kind]
        assert 0 < told["relative_error"]["mean"] < 0.2
        assert told["cosine"]["mean"] > 0.98
        assert (told["agreement"] is None) == (kind == "encoder")


def test_eval_of_a_masked_model_says_pseudo_perplexity(call, models, text):  # noqa: F811
    code, out, err = call("eval", models / "masked", "--text", text, "--max-tokens", 20)
    assert code == 0, err
    assert "pseudo-perplexity" in out
    assert "tokens in 1 windows" in out


def test_eval_of_an_encoder_wants_another_to_compare_with(call, models, text):  # noqa: F811
    code, _, err = call("eval", models / "encoder", "--text", text)
    assert code == 2
    assert "--against FLOAT_MODEL" in err


@pytest.mark.filterwarnings("ignore")
def test_quantize_shows_what_an_encoder_lost(call, models, text, tmp_path):  # noqa: F811
    code, out, err = call("quantize", models / "encoder", "-o", tmp_path / "out", "--eval-text", text)
    assert code == 0, err
    assert "||model - reference|| / ||reference||" in out
    assert "cosine of a row" in out
    assert "| cosine of a row with the float one, mean |" in (tmp_path / "out" / "README.md").read_text()
    assert "Layers by what they do to their own output" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("masked", "KL(float || quantised) of masked tokens, nats per token"),
        ("encoder", "1 - cosine of the vector"),
        ("classifier", "KL(float || quantised) of the label, nats per text"),
    ],
)
def test_layers_of_encoders_are_ranked_and_chosen_by_what_these_tell(call, models, text, tmp_path, kind, measure):  # noqa: F811
    short = ("--windows", 1, "--seq-len", 20)
    code, out, err = call("sensitivity", models / kind, "--text", text, *short, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert measure in told["measure"]
    assert told["kl_nats"] > 0
    page = tmp_path / "page.html"
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:400])
    chosen = ("--budget", "90%", "--text", short, "--eval-text", short, "--report", page)
    code, out, err = call("quantize", models / kind, "-o", tmp_path / "out", *chosen)
    assert code == 0, err
    assert measure in " ".join(out.split())
    records = json.loads(page.read_text().partition('id="records">')[2].partition("</script>")[0])
    assert f"; KL is {measure}" in records["measured_on"]
    assert records["budget"]["constraint"] == "at most 90 % lost"
    assert all(layer["kl_alone"] >= 0 for layer in records["layers"])
    if kind != "masked":
        assert records["headline"]["output_cosine"]["mean"] > 0.9
        assert "with the float model's" in records["headline"]["verdict"]
