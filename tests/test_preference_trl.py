"""Losses of preferences and rewards, and their gradients, against trl's own trainers on the same model and tokens."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import transformers
from torch import Tensor

from allyouneed.core.seeds import generator
from allyouneed.data.packing import IGNORED, answer
from allyouneed.data.preferences import Ranked, collate
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import llama
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.heads import Classifier
from allyouneed.objectives import preference, reward

trl = pytest.importorskip("trl")
BETA, EPSILON, TOLERANCE = 0.4, 0.2, 1e-6
OURS = {
    "sigmoid": preference.preference(preference.dpo(BETA), BETA),
    "robust": preference.preference(preference.robust_dpo(BETA, EPSILON), BETA),
    "ipo": preference.preference(preference.ipo(BETA), BETA, per_token=True),
}


def architecture():
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 24}
    return llama.architecture(vocab_size=257, context=32, **sizes)


def pairs() -> list[Ranked]:
    draw = generator(0, "pairs")

    def some(length: int) -> list[int]:
        return torch.randint(3, 250, (length,), generator=draw).tolist()

    made = []
    for i in range(4):
        prompt = some(2 + i)
        made.append(Ranked((answer(prompt, some(1 + i)), answer(prompt, some(5 - i))), (0, 1), margin=0.5 * i))
    return made


def theirs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens as trl has them: preferred answers above the others."""
    ids, segments, targets = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("ids", "segments", "targets"))
    ids = ids.masked_fill(segments == 0, byte_tokenizer().pad_id)  # by which theirs finds a text's last token
    learned = torch.zeros_like(ids)
    learned[:, 1:] = targets[:, :-1] != IGNORED
    return {"input_ids": ids, "attention_mask": segments, "completion_mask": learned}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A policy, its reference and a reward model, saved for both to read."""
    torch.manual_seed(0)
    made = {"policy": architecture().build(), "reference": architecture().build()}
    config = Classifier.Config(model=architecture(), labels=("reward",), bias=False, dropout=0.0, pad_id=0)
    made["reward"] = config.build()
    torch.nn.init.normal_(made["reward"].layer.weight)
    found = {}
    for name, module in made.items():
        found[name] = tmp_path_factory.mktemp(name)
        huggingface.save(module, found[name])
        byte_tokenizer().save(found[name])
    return found


def settings(config: type, folder: Path, **more):
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return config(output_dir=str(folder), per_device_train_batch_size=4, gradient_checkpointing=False, **quiet, **more)


def lines() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def compared(ours: torch.nn.Module, theirs: torch.nn.Module, tmp_path: Path) -> float:
    """The largest difference between gradients of a tensor, as a share of its largest; by transformers' names."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    huggingface.save(ours, tmp_path / "gradients")
    read = type(theirs).from_pretrained(tmp_path / "gradients").state_dict()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gaps = [((grad - read[name]).abs().max() / grad.abs().max()).item() for name, grad in wanted.items()]
    assert len(gaps) > 10
    return max(gaps)


@pytest.mark.parametrize("name", OURS)
def test_preferences(name, folders, tmp_path):
    batch = collate(pairs())
    policy, reference = (huggingface.load(folders[side]).double() for side in ("policy", "reference"))
    with torch.no_grad():
        batch["reference"] = preference.answer_logprobs(reference, batch)
    loss = OURS[name](policy, batch)
    loss.mean.backward()
    load = transformers.AutoModelForCausalLM.from_pretrained
    # float64, since in float32 sums of forty log-probabilities are good for 1e-6 only
    trainer = trl.DPOTrainer(
        model=load(folders["policy"]),
        ref_model=load(folders["reference"]),
        args=settings(trl.DPOConfig, tmp_path / "run", beta=BETA, label_smoothing=EPSILON, loss_type=[name]),
        train_dataset=lines(),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["policy"]),
    )
    trainer.model.double(), trainer.ref_model.double()
    theirs = trainer._compute_loss(trainer.model, theirs_of(batch), False)
    theirs.backward()
    assert loss.mean.item() == pytest.approx(theirs.item(), rel=TOLERANCE, abs=TOLERANCE)
    assert compared(policy, trainer.model, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("margin", [False, True])
def test_rewards(margin, folders, tmp_path):
    batch = collate(pairs())
    if not margin:
        del batch["margin"]
    module = huggingface.load(folders["reward"])
    loss = reward.reward()(module, batch)
    loss.mean.backward()
    trainer = trl.RewardTrainer(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(folders["reward"]),
        args=settings(trl.RewardConfig, tmp_path / "run"),
        train_dataset=lines(),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["reward"]),
    )
    given = {name: x for name, x in theirs_of(batch).items() if name != "completion_mask"}
    given |= {"margin": batch["margin"]} if margin else {}
    theirs = trainer.compute_loss(trainer.model, given)
    theirs.backward()
    assert loss.mean.item() == pytest.approx(theirs.item(), rel=TOLERANCE, abs=TOLERANCE)
    assert compared(module, trainer.model, tmp_path) <= TOLERANCE
