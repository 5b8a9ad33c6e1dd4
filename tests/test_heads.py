"""Heads for labels against transformers' classes, both ways; inputs against the paper's; the loss against float64."""

from __future__ import annotations

import json

import oracles
import pytest
import torch
import transformers

from allyouneed.core.errors import InputError
from allyouneed.data import labelled
from allyouneed.data.packing import IGNORED
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.heads import Chooser, Classifier, SpanReader, Tagger
from allyouneed.models.recurrent import RecurrentModel
from allyouneed.nn.recurrent import LSTM, Recurrent
from allyouneed.objectives.labels import labels

TOLERANCE = 1e-4
HEADED = {family.architecture: family for families in huggingface.HEADED.values() for family in families}


@pytest.fixture(scope="module", params=HEADED, ids=str)
def pair(request, tmp_path_factory):
    """A random model of ours, its family, and theirs read from the folder that ours was saved to."""
    family = HEADED[request.param]
    ours = oracles.randomised(family.example).eval()
    folder = tmp_path_factory.mktemp("ours")
    huggingface.save(ours, folder)
    theirs = getattr(transformers, family.architecture).from_pretrained(folder, attn_implementation="eager")
    return ours, theirs.eval(), folder


def batch(readings: int = 1) -> dict[str, torch.Tensor]:
    """Three rows of different lengths, padded on the right with 0, which no token is."""
    lengths = torch.tensor([[11, 6, 3], [4, 11, 9], [7, 8, 11]])[:, :readings]
    ids = torch.randint(3, 53, (3, readings, 11), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(11) < lengths[..., None]).long()
    return {"ids": ids * segments, "segments": segments}


def theirs_told(theirs, ours, made) -> torch.Tensor:
    given = {"input_ids": made["ids"], "attention_mask": made["segments"]}
    if not isinstance(ours, Chooser):
        given = {name: x[:, 0] for name, x in given.items()}
    found = theirs(**given)
    if isinstance(ours, SpanReader):
        told = torch.stack((found.start_logits, found.end_logits), 1)
        return told.masked_fill(made["segments"] == 0, float("-inf"))
    return found.logits if isinstance(ours, Tagger) else found.logits[:, None]


def compared(ours, made, told: torch.Tensor) -> torch.Tensor:
    """What padding has to say counts for nothing."""
    return told[made["segments"][:, 0] == 1] if isinstance(ours, Tagger) else told


@torch.no_grad()
def test_logits_are_theirs(pair):
    ours, theirs, _ = pair
    made = batch(3 if isinstance(ours, Chooser) else 1)
    expected, told = (compared(ours, made, x) for x in (theirs_told(theirs, ours, made), ours(made)))
    assert expected[expected.isfinite()].std() > 0.05
    assert torch.equal(expected.isfinite(), told.isfinite())
    assert (expected - told)[expected.isfinite()].abs().max() <= TOLERANCE


def test_what_they_save_we_read(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    read, made = huggingface.load(tmp_path), batch(3 if isinstance(ours, Chooser) else 1)
    assert type(read) is type(ours)
    with torch.no_grad():
        expected, told = compared(ours, made, ours(made)), compared(ours, made, read(made))
    assert torch.allclose(expected, told, atol=1e-5)
    if isinstance(ours, Classifier | Tagger):
        assert read.config.labels == ("no", "perhaps", "yes")


def test_gradients_are_theirs(pair):
    ours, theirs, _ = pair
    made = batch(3 if isinstance(ours, Chooser) else 1)
    for module, told in ((theirs, theirs_told(theirs, ours, made)), (ours, ours(made))):
        module.zero_grad()
        compared(ours, made, told).nan_to_num(neginf=0.0).square().sum().backward()
    layer = next(m for m in reversed(list(theirs.modules())) if isinstance(m, torch.nn.Linear))
    assert (layer.weight.grad - ours.layer.weight.grad).abs().max() <= 1e-3 * layer.weight.grad.abs().max()
    mine, expected = ours.model.embedding.weight.grad, theirs.get_input_embeddings().weight.grad
    mine, expected = mine[1:], expected[1:]  # of padding theirs has none
    assert (mine - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_padding_and_further_readings_change_nothing():
    for kind in (Classifier, Chooser):
        torch.manual_seed(0)
        head = kind.Config(model=HEADED["GPT2ForSequenceClassification"].example.model, labels=("a", "b")).build()
        head.eval()
        made = batch(3)
        with torch.no_grad():
            together = head(made)
            alone = [head({name: x[row : row + 1] for name, x in made.items()}) for row in range(3)]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_a_recurrent_model_under_a_head():
    model = RecurrentModel.Config(vocab_size=53, dim=12, layers=Recurrent.Config(cell=LSTM.Config()))
    head = Classifier.Config(model=model, labels=("a", "b")).build().eval()
    made = batch()
    with torch.no_grad():
        row = made["ids"][1, 0, :4]
        expected = head.layer(head.model.hidden(row[None])[:, -1])
        assert torch.allclose(head(made)[1], expected, atol=1e-5)


def test_the_loss_is_the_papers_in_float64():
    """L₃ = L₂ + λ·L₁ (Radford et al. 2018, eq. 5), the language model's part being the mean over a row's readings."""
    torch.manual_seed(0)
    head = Classifier.Config(model=HEADED["GPT2ForSequenceClassification"].example.model, labels=("a", "b"), dropout=0)
    module = head.build().double()
    made = batch(2) | {"labels": torch.tensor([[0], [1], [1]])}
    loss = labels(0.5)(module, made)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        vectors, nlls = [], []
        for reading in range(2):
            ids = made["ids"][row, reading][made["segments"][row, reading] == 1][None]
            hidden = module.model.hidden(ids)
            vectors.append(hidden[0, -1])
            logprobs = module.model.head(hidden).log_softmax(-1)[0, :-1]
            nlls.append(-logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].mean())
        told = module.layer(sum(vectors)).log_softmax(-1)
        total = total - told[made["labels"][row, 0]] + 0.5 * sum(nlls) / 2
    assert loss.weight == 3
    assert torch.allclose(loss.total, total, atol=1e-10)


def test_frames_of_the_paper():
    """Section 3.3: start, text, extract; a delimiter between two texts; a pair read both ways; one reading a choice."""
    tokenizer = byte_tokenizer().framed("<s>", "<$>", "<e>")
    s, d, e = (tokenizer.token_id(token) for token in ("<s>", "<$>", "<e>"))
    a, b, c = (ord(letter) for letter in "abc")
    assert labelled.of_text(tokenizer, "a", 1) == labelled.Example(([s, a, e],), ([0, 0, 0],), (1,))
    assert labelled.of_pairs(tokenizer, [("a", "b")], 0).ids == ([s, a, d, b, e],)
    assert labelled.of_pairs(tokenizer, labelled.both_ways("a", "b"), 0).ids == ([s, a, d, b, e], [s, b, d, a, e])
    assert labelled.of_pairs(tokenizer, [("a", "b"), ("a", "c")], 1).ids == ([s, a, d, b, e], [s, a, d, c, e])
    assert tokenizer.framed("<s>", "<$>", "<e>").vocab_size == tokenizer.vocab_size  # known tokens keep their ids


def test_spans_and_tags_find_their_tokens():
    tokenizer = byte_tokenizer().framed("<s>", "<$>", "<e>")
    span = labelled.of_span(tokenizer, "who", "the né cat", [("né", 4)])
    begin, end = span.example.labels
    assert tokenizer.decode(span.example.ids[0][begin : end + 1]) == "né"
    assert span.places[begin] == (4, 5) and span.places[end] == (5, 6)
    made = labelled.of_tags(tokenizer, ["ab", "c"], [2, 1])
    assert made.labels == (IGNORED, 2, IGNORED, 1, IGNORED, IGNORED)  # the space before a word belongs to it
    with pytest.raises(InputError, match=r"answers: 'dog' at character 4, where 'né ' is"):
        labelled.of_span(tokenizer, "who", "the né cat", [("dog", 4)])
    with pytest.raises(InputError, match="2 tokens and 1 tags"):
        labelled.of_tags(tokenizer, ["ab", "c"], [2])


def test_more_tokens_leave_the_others_as_they_were():
    torch.manual_seed(0)
    for tied in (True, False):
        model = HEADED["GPT2ForSequenceClassification"].example.model.replace(tied=tied).build().eval()
        ids = batch()["ids"][:, 0]
        with torch.no_grad():
            before, kept = model(ids).logits, model.embedding.weight.clone()
            model.grow(56)
            after = model(ids).logits
        assert torch.equal(model.embedding.weight[:53], kept)
        assert after.shape[-1] == 56 and model.config.vocab_size == 56
        assert (
            torch.allclose(before, after[..., :53], atol=1e-6) and (model.head.weight is model.embedding.weight) == tied
        )


def test_names_of_classes_that_are_none(tmp_path):
    ours = HEADED["GPT2ForSequenceClassification"].example.build()
    huggingface.save(ours, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for names in ([], {"0": "a", "2": "b"}, {"0": 1}, {}):
        (tmp_path / "config.json").write_text(json.dumps(described | {"id2label": names}))
        with pytest.raises(InputError, match="id2label"):
            huggingface.load(tmp_path)
