"""Small encoders, trained here in a minute each on text that is made here, or on pictures that scikit-learn ships.

Where no model can be fetched, random weights are the alternative, and they are kind: their activations have no
outliers, and nothing depends on what they answer.

    embedder     finds a text among others by one that says most of the same in other words
    classifier   says what a text is mostly about, where its words are of many things
    digits       reads handwritten digits, as ViT sees pictures
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
CONCEPTS, WAYS, TOPICS = 48, 4, 8
LABELS = tuple(f"topic{number}" for number in range(TOPICS))


@dataclass
class Language:
    """A language with several words for each thing, from a seed."""

    seed: int = 0
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    @staticmethod
    def words() -> list[str]:
        """All that there are: of each thing its words, and some that say nothing."""
        return [_word(concept, way) for concept in range(CONCEPTS) for way in range(WAYS)] + _FILLERS

    def pair(self) -> tuple[str, str]:
        """A text, and one that says most of the same in other words."""
        said = self.draw.sample(range(CONCEPTS), 7)
        again = self.draw.sample(said, 5) + self.draw.sample(range(CONCEPTS), 1)
        return self._written(said), self._written(again)

    def labelled(self) -> tuple[str, int]:
        """A text of many things, and what a little more of it is about than chance would have."""
        topic = self.draw.randrange(TOPICS)
        own = range(topic * CONCEPTS // TOPICS, (topic + 1) * CONCEPTS // TOPICS)
        said = [self.draw.choice(own if self.draw.random() < 0.4 else range(CONCEPTS)) for _ in range(12)]
        return self._written(said), topic

    def _written(self, concepts: Sequence[int]) -> str:
        words = [_word(concept, self.draw.randrange(WAYS)) for concept in concepts]
        for _ in range(len(words) // 2):
            words.insert(self.draw.randrange(len(words) + 1), self.draw.choice(_FILLERS))
        return " ".join(words)


_FILLERS = [f"um{number}" for number in range(24)]


def _word(concept: int, way: int) -> str:
    return f"{'abcd'[way]}{concept}"


def tokenizer() -> Any:
    """A word, an id."""
    known = {word: number for number, word in enumerate([*SPECIAL, *Language.words()])}
    made = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    frame = [(word, known[word]) for word in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)


def config(*, hidden: int = 128, layers: int = 3) -> Any:
    """Of a BERT, whose norms come after its sums."""
    return BertConfig(
        vocab_size=len(SPECIAL) + len(Language.words()),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def mean_pooled(model: nn.Module, inputs: Any) -> Tensor:
    """(texts, hidden) the mean of the states of the tokens that are no padding."""
    seen = inputs["attention_mask"][..., None]
    return (model(**inputs).last_hidden_state * seen).sum(1) / seen.sum(1)


def trained(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float = 2e-3) -> nn.Module:
    """A model after so many steps of AdamW, the rate warmed up over a tenth of them and then let down to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    shape = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        shape.step()
    return model.eval()


def embedder(*, steps: int = 400, batch: int = 64, seed: int = 0, **sizes: int) -> Any:
    """A BERT whose pooled states are near where texts say the same: the others of a batch are the negatives."""
    torch.manual_seed(seed)
    language, reads, model = Language(seed), tokenizer(), BertModel(config(**sizes), add_pooling_layer=False)

    def loss() -> Tensor:
        pairs = [language.pair() for _ in range(batch)]
        sides = [read(reads, [pair[side] for pair in pairs]) for side in (0, 1)]
        asked, found = (F.normalize(mean_pooled(model, side), dim=-1) for side in sides)
        return F.cross_entropy(20 * asked @ found.T, torch.arange(batch))

    return trained(model, loss, steps)


def classifier(*, steps: int = 400, batch: int = 64, seed: int = 0, **sizes: int) -> Any:
    """A BERT that says what a text is mostly about."""
    torch.manual_seed(seed)
    language, reads, model = Language(seed), tokenizer(), BertForSequenceClassification(config(**sizes))

    def loss() -> Tensor:
        texts, labels = zip(*(language.labelled() for _ in range(batch)), strict=True)
        inputs = read(reads, texts)
        return F.cross_entropy(model(**inputs).logits, torch.tensor(labels))

    return trained(model, loss, steps)


def read(reads: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """A padded batch."""
    inputs = reads(list(texts), padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def digits(*, steps: int = 400, batch: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, list[int], Any]:
    """Pictures to train on, others, what those show, and a trained ViT, whose norms come before."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels, order = torch.tensor(found.target), torch.randperm(len(pictures))
    train, rest = order[:1000], order[1000:]
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    model = ViTForImageClassification(ViTConfig(**sizes, **shape, num_labels=10))

    def loss() -> Tensor:
        chosen = train[torch.randint(len(train), (batch,))]
        return F.cross_entropy(model(pictures[chosen]).logits, labels[chosen])

    return pictures[train], pictures[rest], labels[rest].tolist(), trained(model, loss, steps)
