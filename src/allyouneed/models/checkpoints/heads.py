"""The classes of `transformers` that are a model of some family and one linear layer: their names, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from allyouneed.models.checkpoints.family import HEAD_STORED, NOT_COMPUTED, Family
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule, both, same
from allyouneed.models.heads import Chooser, Classifier, Head, SpanReader, Tagger

# The end of the class's name, ours, and the name of its layer.
_ENCODERS = (
    ("ForSequenceClassification", Classifier, "classifier"),
    ("ForMultipleChoice", Chooser, "classifier"),
    ("ForTokenClassification", Tagger, "classifier"),
    ("ForQuestionAnswering", SpanReader, "qa_outputs"),
)
_DECODERS = (
    ("ForSequenceClassification", Classifier, "score"),
    ("ForTokenClassification", Tagger, "classifier"),
    ("ForQuestionAnswering", SpanReader, "qa_outputs"),
)
_LLAMA = (("ForSequenceClassification", Classifier, "score"), ("ForTokenClassification", Tagger, "score"))
_KNOWN = {
    "bert": ("Bert", _ENCODERS),
    "openai-gpt": ("OpenAIGPT", _DECODERS[:1]),
    "gpt2": ("GPT2", _DECODERS),
    "bloom": ("Bloom", _DECODERS),
    "gpt_neo": ("GPTNeo", _DECODERS),
    "gpt_neox": ("GPTNeoX", _DECODERS),
    "llama": ("Llama", _LLAMA),
}


def over(family: Family[Any]) -> tuple[Family[Any], ...]:
    """The families of `family`'s models with a head, as far as transformers has them."""
    name, heads = _KNOWN.get(family.model_type, ("", ()))
    return tuple(_headed(family, name + ending, kind, layer) for ending, kind, layer in heads)


def _headed(base: Family[Any], architecture: str, kind: type[Head], layer: str) -> Family[Any]:
    encoder = base.model_type == "bert"
    unpooled = encoder and kind in (Tagger, SpanReader)
    bias = encoder or kind is not Classifier
    prefix = "bert." if encoder else ""
    named = kind in (Classifier, Tagger)

    def of(model: Any) -> Any:
        """The model that stands under such a head: one without a pooler where nobody asks for a vector of the whole."""
        return model.replace(pooled=False) if unpooled else model

    def read(fields: Fields) -> Any:
        model = of(base.read(fields))
        if not encoder and not model.tied and not fields.values.get(HEAD_STORED, True):
            model = model.replace(tied=True)  # these classes hold no language model's head
        pad = fields.values.get("pad_token_id")
        pad_id = None if pad is None else fields.integer("pad_token_id", least=0)
        labels = _labels(fields) if named else ()
        return kind.Config(model=model, labels=labels, bias=bias, pad_id=pad_id)

    def write(config: Any) -> dict[str, Any]:
        model = config.model
        if encoder:
            model = model.replace(pooled=unpooled or model.pooled)
        names = {
            "id2label": {str(i): label for i, label in enumerate(config.labels)},
            "label2id": {label: i for i, label in enumerate(config.labels)},
        }
        # without a language model's head nothing is tied; vLLM 0.19 cannot build a tied GPT-NeoX under a classifier
        tied = {"tie_word_embeddings": False} if not encoder and model.tied else {}
        return base.write(model) | (names if named else {}) | {"pad_token_id": config.pad_id} | tied

    def rules(config: Any) -> tuple[Rule, ...]:
        kept = [rule for rule in base.rules(config.model) if not (unpooled and rule.ours[0].startswith("pooler."))]
        moved = [
            replace(rule, ours=tuple(f"model.{name}" for name in rule.ours), theirs=prefix + rule.theirs)
            for rule in kept
        ]
        return (*moved, *(both("layer", layer) if bias else (same("layer.weight", f"{layer}.weight"),)))

    example = kind.Config(
        model=of(base.example), labels=("no", "perhaps", "yes") if named else (), bias=bias, dropout=0.0, pad_id=0
    )
    return Family(base.model_type, architecture, read, write, rules, example, (*NOT_COMPUTED, "tied"))


def _labels(fields: Fields) -> tuple[str, ...]:
    """The names of classes by number; where config.json has none, there are two."""
    found = fields.values.get("id2label")
    if found is None:
        return tuple(f"LABEL_{i}" for i in range(fields.integer("num_labels", 2, most=1 << 16)))
    wanted = [str(i) for i in range(len(found))] if isinstance(found, dict) else []
    if not wanted or sorted(found, key=str) != sorted(wanted) or not all(isinstance(x, str) for x in found.values()):
        raise fields.wrong("id2label", found, "an object from 0, 1, … to names")
    return tuple(found[number] for number in wanted)
