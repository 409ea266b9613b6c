"""Model types of each kind pass every column of docs/models.md, and the page is that of the results."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

KINDS = (
    *("codegen", "vit"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *(
                "bert",
                "qwen3_moe",
                "mamba",
                "t5",
                "llama",
                "gpt2",
                "gemma3",
                "llava",
                "xlnet",
                "bart",
                "whisper",
                "wav2vec2",
            ),
            *("clip", "swin", "convnext", "resnet", "blip", "deepseek_v3"),
        )
    ),
)
"""Masked, causal, experts, pictures, Conv1D, state space, vision and language, relative, encoder-decoder, speech,
convolutions, latent attention."""


@pytest.fixture(scope="module")
def models():
    return importlib.import_module("models")


@pytest.fixture(scope="module")
def results(models):
    return json.loads(models.RESULT.read_text())


@pytest.mark.filterwarnings("default")  # those of transformers' models
@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_of_each_kind_passes_every_column(models, model_type):
    trials = importlib.import_module("zoo.trials")
    row = trials.row_of(model_type)
    assert trials.tried(row)
    assert trials.failures(row) == {}
    assert row["integers"] == "yes"


def test_what_fails_in_the_results_is_what_the_list_says(models, results):
    trials, known = importlib.import_module("zoo.trials"), importlib.import_module("zoo.known")
    failing = {name for name, row in results["models"].items() if trials.failures(row)}
    assert failing == set(known.FAILS)
    assert all(known.FAILS.values())


def test_three_hundred_types_were_tried_and_nearly_all_pass(models, results):
    trials = importlib.import_module("zoo.trials")
    rows = [row for row in results["models"].values() if trials.tried(row)]
    passing = [row for row in rows if not trials.failures(row)]
    assert len(rows) >= 300
    assert len(passing) >= 0.98 * len(rows)


def test_the_page_is_made_from_the_results(models, results):
    assert models.page(results) == models.PAGE.read_text()


def test_what_the_rule_for_a_configuration_gets_wrong_is_told_of_fields_that_there_are(models):
    configs, exceptions = importlib.import_module("zoo.configs"), importlib.import_module("zoo.exceptions")
    with configs.quiet():
        for model_type, changes in exceptions.CONFIGS.items():
            configs.tiny(model_type, changes)
        with pytest.raises(ValueError, match="no field for: image_token_id"):
            configs.tiny("blip-2", {"image_token_id": 5})


def test_what_is_masked_in_both_outputs_differs_by_nothing(models):
    compare = importlib.import_module("zoo.compare")
    masked = torch.tensor([3.0, 4.0, -torch.inf])
    assert compare.relative(masked, torch.tensor([3.0, 4.5, -torch.inf])) == pytest.approx(0.1)
    assert compare.relative(masked, torch.tensor([3.0, 4.0, 1.0])) == torch.inf


def test_a_scale_that_begins_at_one_is_moved_little_whatever_its_shape(models):
    build = importlib.import_module("zoo.build")

    class Snake(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = torch.nn.Parameter(torch.ones(1, 500, 1))

        def tie_weights(self):
            """As models of transformers do."""

    snake = Snake()
    build.disturb_(snake)
    assert 0.5 < snake.alpha.min() < snake.alpha.max() < 1.5
