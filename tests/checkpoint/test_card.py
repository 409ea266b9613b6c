"""The card says what the facts say, and nothing else."""

from dataclasses import replace

import pytest
import yaml

from w8a8.checkpoint.card import PLACE, Facts, Measured, Origin, addressed, card, with_measured
from w8a8.checkpoint.vllm import Finding
from w8a8.records.coverage import Coverage, ModuleCoverage


def module(name, scheme, reason, lost=None, *, size=100):
    return ModuleCoverage(name, "Linear", (10, 10), size, size, size, scheme, reason, lost)


COVERAGE = Coverage(
    (
        module("model.embed", None, "a lookup table, no product"),
        module("model.0.up", "w8a8", None, 41.26),
        module("model.0.down", "w8a8", None, 39.04, size=200),
        module("model.1.up", "w8a8-asym", None, float("inf")),
        module("lm_head", None, "the output head stays float by default"),
    )
)
FACTS = Facts(
    coverage=COVERAGE,
    model="LlamaForCausalLM",
    of_transformers=True,
    conv1d=False,
    findings=(),
    bytes=1_234_567,
    versions={"w8a8": "1.2.3", "torch": "4.5.6"},
)
KNOWN = Origin(
    repository="owner/small",
    commit="0123abcd",
    bytes=2_500_000,
    told={
        "license": "mit",
        "language": ["en", "no"],
        "tags": ["theirs"],
        "metrics": "99",
        "pipeline_tag": "text-generation",
    },
    card=True,
)
REFUSED = Finding(True, ("a.b",), "something", "somewhere", "another thing")
NOTED = replace(REFUSED, refused=False)
MEASURED = Measured("On a text.", (("perplexity", "12.5", "12.1 to 12.9"),), "Indistinguishable.")


def front(text):
    _, fields, rest = text.split("---\n", 2)
    return yaml.safe_load(fields), rest


def section(text, heading):
    return text.split(f"{heading}\n")[1].split("\n## ")[0]


def test_a_card_of_a_model_from_nowhere_claims_nothing_of_it():
    fields, text = front(card(FACTS))
    assert fields == {"library_name": "transformers", "tags": ["w8a8", "int8", "compressed-tensors", "w8a8-asym"]}
    assert text.startswith("\n# LlamaForCausalLM, quantised: w8a8, w8a8-asym\n")
    assert "huggingface.co" not in text
    assert "float model:" not in text
    assert "README.source.md" not in text


def test_what_the_float_models_card_says_of_its_licence_is_repeated_and_its_figures_are_not():
    fields, text = front(card(replace(FACTS, origin=KNOWN)))
    assert fields["license"] == "mit"
    assert fields["language"] == ["en", "no"]
    assert fields["pipeline_tag"] == "text-generation"
    assert fields["base_model"] == "owner/small"
    assert fields["base_model_relation"] == "quantized"
    assert not {"metrics", "license_name"} & set(fields)
    assert "theirs" not in fields["tags"]
    assert "[owner/small](https://huggingface.co/owner/small) at commit `0123abcd`" in text
    assert "Tensors in the files: 1.23 MB; in those of the float model: 2.50 MB." in text


def test_a_library_of_its_own_is_kept():
    origin = Origin(told={"library_name": "sentence-transformers"})
    assert front(card(replace(FACTS, origin=origin)))[0]["library_name"] == "sentence-transformers"


def test_shares_layers_and_reasons_are_those_of_the_coverage():
    text = card(FACTS)
    assert "66.7 % of the parameters and 66.7 % of the multiply-adds" in text
    assert "| `w8a8` | 2 | weights int8 channel sym, activations int8 token sym |" in text
    assert "| `model.0.down` | 39.0 dB |\n| `model.0.up` | 41.3 dB |\n| `model.1.up` | exact |" in text
    assert "| `lm_head` | 100 | the output head stays float by default |" in text


def test_figures_that_were_not_measured_are_not_there():
    unmeasured = Coverage(tuple(replace(m, weight_sqnr_db=None) for m in COVERAGE.modules))
    text = card(replace(FACTS, coverage=unmeasured))
    assert "dB" not in text
    assert section(text, "## What it costs").strip().startswith("Not measured when this was saved.")


def test_a_name_cannot_end_its_cell_nor_its_quoting():
    hostile = Coverage((*COVERAGE.modules, module("a|b`c\n# d", None, "excluded by '<b>|*'\n\n## Licence")))
    text = card(replace(FACTS, coverage=hostile))
    assert "| `a\\|b'c # d` | 100 | excluded by '&lt;b>\\|*' ## Licence |" in text
    assert "\n## Licence" not in text


class TestWhoRunsIt:
    def test_everybody(self):
        text = card(FACTS)
        assert f'transformers.LlamaForCausalLM.from_pretrained("{PLACE}")' in text
        assert f'w8a8.load("{PLACE}")' in text
        assert f"vllm serve {PLACE}" in text

    def test_no_line_for_vllm_where_it_refuses(self):
        text = card(replace(FACTS, findings=(NOTED, REFUSED)))
        assert "vllm serve" not in text
        assert text.count("a.b: something (somewhere); another thing") == 1

    def test_what_vllm_does_otherwise_is_said_beside_the_line(self):
        text = card(replace(FACTS, findings=(NOTED,)))
        assert "vllm serve" in text
        assert "- a.b: something (somewhere); another thing" in text

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"of_transformers": False}, "transformers has no class LlamaForCausalLM"),
            ({"conv1d": True}, "no common format for quantised `Conv1D`"),
            ({"coverage": Coverage((module("m.experts.0.w1", "w8a8", None),))}, "stops at experts that are quantised"),
        ],
    )
    def test_no_line_for_transformers_where_it_refuses(self, changed, why):
        text = card(replace(FACTS, **changed))
        assert "from_pretrained" not in text
        assert why in text


class TestMeasured:
    def test_it_takes_the_place_of_what_was_there_and_of_nothing_else(self):
        before = card(FACTS)
        after = with_measured(before, MEASURED)
        assert section(after, "## What it costs").strip() == (
            "On a text.\n\n| measure | value | 95 % interval |\n| --- | --- | --- |\n"
            "| perplexity | 12.5 | 12.1 to 12.9 |\n\nIndistinguishable."
        )
        cost = section(before, "## What it costs")
        assert after.replace(section(after, "## What it costs"), cost) == before

    def test_measured_again_the_last_counts(self):
        once = with_measured(card(FACTS), MEASURED)
        again = with_measured(with_measured(card(FACTS), replace(MEASURED, on="Before.")), MEASURED)
        assert again == once

    def test_a_card_without_the_place_is_told(self):
        assert with_measured("# A card of somebody's\n", MEASURED) is None


def test_on_the_hub_the_directory_has_its_name_there():
    text = addressed(card(FACTS), "owner/name")
    assert PLACE not in text
    assert 'w8a8.load("owner/name")' in text
    assert "vllm serve owner/name" in text


def test_a_card_of_a_float_model_that_could_not_be_read_is_told():
    text = card(replace(FACTS, origin=Origin(card=True, unread="ScannerError")))
    assert "Its front matter cannot be read (ScannerError), so no licence is repeated from it." in text


def test_tables_are_told_beside_linear_layers():
    table = replace(module("model.embed", "w8a16", None), kind="QuantEmbedding")
    told = card(replace(FACTS, coverage=Coverage((table, *COVERAGE.modules[1:]))))
    assert "with 3 linear layers and 1 lookup table quantised" in told
    assert "with 3 linear layers quantised" in card(FACTS)
