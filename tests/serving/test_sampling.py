import pytest
import torch

from w8a8.serving.sampling import Chooser, Sampling, chosen

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0])


def drawn(sampling, count=300, prompt=()):
    chooser = Chooser(sampling, list(prompt))
    return {chooser.choose(LOGITS.clone()) for _ in range(count)}


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_k": 2}, {0, 1}),
        ({"temperature": 1.0, "top_p": 0.62}, {0, 1}),  # 0.61 of all is token 0's
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.62}, {0}),  # 0.63 of three
        ({"temperature": 1.0, "min_p": 0.3}, {0, 1}),
        ({"temperature": 1e-9}, {0}),
        ({"bias": {3: 100.0}}, {3}),
        ({"bias": {0: -100.0}}, {1}),
        ({"bias": {0: -100.0}, "temperature": 1.0, "top_k": 1}, {1}),
    ],
)
def test_only_what_was_asked_for_is_drawn(asked, tokens):
    assert drawn(Sampling(seed=1, **asked)) == tokens


@pytest.mark.parametrize(
    ("asked", "prompt", "written", "token"),
    [
        ({"repetition_penalty": 4.0}, [0], [], 1),
        ({"repetition_penalty": 4.0}, [3], [], 0),
        ({"presence_penalty": 1.5}, [0], [], 0),  # of what was written, not of the prompt
        ({"presence_penalty": 1.5}, [], [0], 1),
        ({"frequency_penalty": 0.6}, [], [0], 0),
        ({"frequency_penalty": 0.6}, [], [0, 0], 1),
    ],
)
def test_what_was_there_is_penalised(asked, prompt, written, token):
    chooser = Chooser(Sampling(**asked), prompt)
    for each in written:
        chooser.wrote(each)
    assert chooser.choose(LOGITS.clone()) == token


def test_a_seed_gives_the_same_tokens_and_rows_are_chosen_for_together():
    hot = Sampling(temperature=1.0, seed=5)
    rows = torch.stack([LOGITS, LOGITS.flip(0), torch.full((4,), torch.nan), torch.full((4,), -torch.inf)])
    choosers = [Chooser(hot, []), Chooser(Sampling(), []), Chooser(hot, []), Chooser(hot, [])]
    found = chosen(choosers, rows)
    assert found == [Chooser(hot, []).choose(LOGITS.clone()), 3, None, None]
