"""BERT against `transformers`, with and without its heads: outputs, gradients, files both ways, wrong files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import oracles
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from allyouneed.core.errors import InputError
from allyouneed.models import bert
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.models.encoder import Encoder, MaskedModel

TOLERANCE = 1e-4
VARIANTS = {
    "pre-training": (oracles.bert, {}),
    "encoder": (oracles.bert_encoder, {}),
    "pre-training, relu, 3 types, other eps": (
        oracles.bert,
        {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-3, "num_attention_heads": 3},
    ),
    "encoder, tanh gelu": (oracles.bert_encoder, {"hidden_act": "gelu_new"}),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request, tmp_path_factory):
    """A random model of theirs, and ours read from the folder that it was saved to."""
    make, changes = VARIANTS[request.param]
    theirs = make(**changes)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, huggingface.load(folder)


def batch(rows: int = 4, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sentences a row, padded on the right, the first row full."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, 5, 17, 2])[:rows, None]
    places = torch.arange(length)
    return {
        "ids": torch.randint(3, 97, (rows, length), generator=source) * (places < lengths),
        "segments": (places < lengths).long(),
        "types": ((places >= lengths // 2) & (places < lengths)).long(),
    }


def outputs_of_theirs(model: transformers.PreTrainedModel, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = model(input_ids=x["ids"], attention_mask=x["segments"], token_type_ids=x["types"])
    if isinstance(model, transformers.BertForPreTraining):
        return {"logits": out.prediction_logits, "pairs": out.seq_relationship_logits}
    return {"hidden": out.last_hidden_state, "pooled": out.pooler_output}


def outputs_of_ours(model: Encoder, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = model(x["ids"], segments=x["segments"], types=x["types"])
    if isinstance(model, MaskedModel):
        return {"logits": out.logits, "pairs": out.pairs}
    return {"hidden": out, "pooled": model.pool(out)}


def compare(theirs: transformers.PreTrainedModel, ours: Encoder, x: dict[str, torch.Tensor]) -> None:
    real = x["segments"] == 1
    expected, found = outputs_of_theirs(theirs, x), outputs_of_ours(ours, x)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.std() > 0.05  # else equality would say nothing
        places = real if tensor.shape[:2] == real.shape else slice(None)
        assert (tensor[places] - found[name][places]).abs().max() <= TOLERANCE, name


@torch.no_grad()
def test_outputs_with_padding_and_types(pair):
    compare(*pair, batch())


@torch.no_grad()
def test_types_matter_and_default_to_the_first(pair):
    theirs, ours = pair
    x = batch(1)
    plain = {"ids": x["ids"], "segments": x["segments"], "types": torch.zeros_like(x["types"])}
    compare(theirs, ours, plain)
    first = next(iter(outputs_of_ours(ours, x).values()))
    default = ours(x["ids"])
    default = default.logits if isinstance(ours, MaskedModel) else default
    assert (first - default).abs().max() > 1e-2
    assert (next(iter(outputs_of_ours(ours, plain).values())) - default).abs().max() <= 1e-5


def test_gradients_of_one_step(pair):
    theirs, ours = pair
    x = batch(seed=1)
    targets = torch.where((x["segments"] == 1) & (torch.arange(24) % 4 == 1), (x["ids"] * 7) % 97, -100)
    following = torch.tensor([0, 1, 1, 0])

    def loss_of(found: dict[str, torch.Tensor]) -> torch.Tensor:
        if "logits" in found:
            masked = F.cross_entropy(found["logits"].flatten(0, 1), targets.flatten())
            return masked + F.cross_entropy(found["pairs"], following)
        real = x["segments"] == 1
        return found["hidden"][real].pow(3).mean() + found["pooled"].pow(2).sum()

    losses = []
    for module, outputs in ((theirs, outputs_of_theirs), (ours, outputs_of_ours)):
        module.zero_grad()
        loss = loss_of(outputs(module, x))
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) <= TOLERANCE
    if isinstance(ours, MaskedModel):
        labelled = theirs(
            input_ids=x["ids"],
            attention_mask=x["segments"],
            token_type_ids=x["types"],
            labels=targets,
            next_sentence_label=following,
        )
        assert abs(labelled.loss.item() - losses[1]) <= TOLERANCE
    rules = _family(ours).rules(ours.config)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    mapped = huggingface.to_theirs(rules, ours.config.layers, gradients)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(mapped) == set(expected)
    for name, gradient in mapped.items():
        assert (gradient - expected[name]).abs().max() <= TOLERANCE, name
    ours.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 3])
def test_their_loader_reads_what_we_save(pair, tmp_path, shards):
    theirs, ours = pair
    huggingface.save(ours, tmp_path, max_shard_bytes=10**9 if shards == 1 else 100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    again = type(theirs).from_pretrained(tmp_path).eval()
    assert again.config.architectures == theirs.config.architectures
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    compare(again, ours, batch(seed=2))
    compare(theirs, load_module(tmp_path), batch(seed=2))


def test_rates_of_dropout_and_the_scale_of_weights_are_kept(tmp_path):
    config = bert.architecture(vocab_size=53, dim=12, num_layers=1, num_heads=2, dropout=0.25)
    save(config.build(), tmp_path)
    assert load_module(tmp_path).config == config
    save(bert.encoder_of(config).build(), tmp_path / "encoder")
    assert load_module(tmp_path / "encoder").config == bert.encoder_of(config)


def test_names_of_the_first_checkpoints(tmp_path):
    """`position_ids`, which early versions saved, is passed over."""
    theirs = oracles.bert_encoder()
    theirs.save_pretrained(tmp_path)
    _change(tmp_path, lambda tensors: tensors.update({"embeddings.position_ids": torch.arange(64)[None]}))
    with torch.no_grad():
        compare(theirs, load_module(tmp_path), batch())


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (oracles.bert, {"architectures": ["BertModel"]}, ["lacks 'encoder.layer.0", "holds 'bert.", "more"]),
        (oracles.bert_encoder, {"architectures": ["BertForPreTraining"]}, ["lacks 'cls.predictions", "4 more"]),
        (oracles.bert, {"architectures": ["BertForMaskedLM"]}, ["architectures", "BertModel or BertForPreTraining"]),
        (oracles.bert, {"architectures": None}, ["architectures", "BertModel or BertForPreTraining"]),
        (oracles.bert, {"architectures": [["BertModel"]]}, ["architectures"]),
        (
            oracles.bert,
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            ["not the weights of a GPT2LMHeadModel: lacks 'transformer.h.0.", "'bert.", "[48", "more"],
        ),
        (
            oracles.gpt2,
            {"model_type": "bert", "architectures": ["BertModel"]},
            ["not the weights of a BertModel: lacks 'encoder.", "holds 'transformer."],
        ),
        (oracles.bert, {"vocab_size": 98}, ["'embedding.weight' [97, 48]", "'bias' [97]", "[98] and [98, 48]"]),
        (oracles.bert, {"type_vocab_size": 3}, ["'types.weight' [2, 48]", "[3, 48]"]),
        (oracles.bert, {"num_hidden_layers": 4}, ["4 layers", "hold 3"]),
        (oracles.bert, {"is_decoder": True}, ["is_decoder"]),
        (oracles.bert, {"tie_word_embeddings": False}, ["tie_word_embeddings"]),
        (oracles.bert, {"position_embedding_type": "relative_key"}, ["position_embedding_type"]),
    ],
)
def test_what_does_not_belong_together(make, change, named, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    _refused(tmp_path, named)


def test_missing_and_extra_tensors(tmp_path):
    oracles.bert().save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "less")
    _change(tmp_path / "less", lambda t: [t.pop(n) for n in ("bert.pooler.dense.bias", "cls.predictions.bias")])
    _refused(tmp_path / "less", ["lacks 'bert.pooler.dense.bias', 'cls.predictions.bias'"])
    more = {f"cls.extra.{i}": torch.zeros(i + 1, 2) for i in range(5)}
    shutil.copytree(tmp_path / "whole", tmp_path / "more")
    _change(tmp_path / "more", lambda t: t.update(more))
    _refused(tmp_path / "more", ["'cls.extra.0' [1, 2], 'cls.extra.1' [2, 2], 'cls.extra.2' [3, 2] and 2 more"])


def _family(model: Encoder):
    (family,) = (f for f in huggingface.FAMILIES["bert"] if f.fits(model.config))
    return family


def _change(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _refused(folder: Path, named: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        load_module(folder)
    message = str(raised.value)
    assert "\n" not in message and str(folder) in message
    for part in named:
        assert part in message, message
