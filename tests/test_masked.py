"""Masking, pairs of sentences, and what is learned from them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.data.batches import Generated
from allyouneed.data.masked import MaskedPairs, Masking, mask
from allyouneed.data.packing import IGNORED
from allyouneed.data.tokenizer_training import train_wordpiece
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import bert
from allyouneed.models.checkpoints import huggingface
from allyouneed.objectives.masked import masked, masked_and_pairs
from allyouneed.train.gradients import differentiate
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.ranks import Ranks

TEXTS = [
    [f"the {a} sees the {b}", f"then the {b} follows the {a}", f"so the {a} and the {b} are unbelievably happy"]
    for a, b in (("cat", "dog"), ("fox", "hen"), ("owl", "elk"), ("bee", "ant"))
]
TOKENIZER = train_wordpiece([sentence for text in TEXTS for sentence in text], 64)
DOCUMENTS = [TOKENIZER.encode_batch(text) for text in TEXTS]


def pairs(seed: int = 0, **changes: object) -> MaskedPairs:
    return MaskedPairs(DOCUMENTS, TOKENIZER, **({"batch_size": 6, "length": 32, "seed": seed} | changes))


def tiny(dim: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return bert.architecture(
        vocab_size=TOKENIZER.vocab_size, context=32, dim=dim, num_layers=1, num_heads=2, hidden_dim=8
    ).build()


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares():
    ids = torch.randint(10, 1000, (200, 101), generator=source())
    eligible = torch.rand(200, 101, generator=source(1)) < 0.8
    shown, targets = mask(ids, eligible, source(2), mask_id=3, vocab_size=1000, masking=Masking())
    chosen = targets != IGNORED
    assert not (chosen & ~eligible).any() and torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(chosen.sum(1), (eligible.sum(1) * 0.15).round().long())
    assert torch.equal(shown[~chosen], ids[~chosen])
    parts = [(shown[chosen] == 3), (shown[chosen] == ids[chosen])]
    hidden, kept = (part.float().mean().item() for part in parts)
    bound = 4 * (0.8 * 0.2 / chosen.sum().item()) ** 0.5  # four standard errors
    assert abs(hidden - 0.8) < bound and abs(kept - 0.1) < bound
    exchanged = shown[chosen & (shown != 3) & (shown != ids)]
    assert exchanged.min() < 20 and exchanged.max() > 980


def test_every_token_is_as_likely():
    ids, every = torch.arange(20).expand(4000, -1), torch.ones(4000, 20, dtype=torch.bool)
    _, targets = mask(ids, every, source(), mask_id=99, vocab_size=99, masking=Masking())
    rates = (targets != IGNORED).float().mean(0)
    assert (rates - 0.15).abs().max() < 4 * (0.15 * 0.85 / 4000) ** 0.5


def test_whole_words():
    continues = torch.zeros(50, dtype=torch.bool)
    continues[25:] = True
    ids = torch.randint(0, 50, (300, 60), generator=source())
    ids[:, 0], ids[:, 30] = 1, 2
    eligible = torch.ones_like(ids, dtype=torch.bool)
    eligible[:, 0], eligible[:, 30] = False, False  # special tokens
    eligible[:, 50:] = False  # padding
    _, targets = mask(
        ids,
        eligible,
        source(1),
        mask_id=3,
        vocab_size=50,
        masking=Masking(whole_words=True),
        continues=continues,
    )
    chosen = targets != IGNORED
    assert not (chosen & ~eligible).any()
    within = continues[ids][:, 1:] & eligible[:, 1:] & eligible[:, :-1]
    assert torch.equal(chosen[:, 1:][within], chosen[:, :-1][within])  # a piece is chosen as the piece before it
    count = chosen.sum(1)
    assert count.min() >= 1 and (count <= 7).float().mean() > 0.9 and count.float().mean() > 4.5


def test_a_row_of_one_token_is_asked_for_it():
    for whole in (False, True):
        eligible = torch.tensor([[False, True, False]])
        masking, continues = Masking(whole_words=whole), torch.zeros(9, dtype=torch.bool)
        _, targets = mask(
            torch.tensor([[1, 5, 2]]), eligible, source(), mask_id=3, vocab_size=9, masking=masking, continues=continues
        )
        assert targets.tolist() == [[IGNORED, 5, IGNORED]]


def test_pairs_follow_or_do_not():
    batches = pairs(batch_size=64, masking=Masking(hidden=0.0, exchanged=0.0))  # nothing is replaced
    batch = next(batches)
    texts = {i: [token for sentence in document for token in sentence] for i, document in enumerate(DOCUMENTS)}

    def found_in(part: list[int]) -> set[tuple[int, int]]:
        n = len(part)
        return {(i, k) for i, text in texts.items() for k in range(len(text)) if text[k : k + n] == part}

    for row in range(64):
        real = batch["segments"][row] == 1
        ids, types = batch["ids"][row][real].tolist(), batch["types"][row][real].tolist()
        first, second = (
            [i for i, t in zip(ids, types, strict=True) if t == k and i not in (TOKENIZER.cls_id, TOKENIZER.sep_id)]
            for k in (0, 1)
        )
        assert ids[0] == TOKENIZER.cls_id and ids[-1] == TOKENIZER.sep_id and ids.count(TOKENIZER.sep_id) == 2
        assert first and second and len(ids) <= 32
        places, places_of_second = found_in(first), found_in(second)
        if batch["following"][row] == 0:
            assert any((i, k + len(first)) in places_of_second for i, k in places)
        else:
            assert not {i for i, _ in places} & {i for i, _ in places_of_second}
    assert 20 <= batch["following"].sum() <= 44
    assert batch["pair_weights"].sum().item() == pytest.approx((batch["targets"] != IGNORED).sum().item())


def test_state_goes_on_bit_for_bit():
    ours, other = pairs(), pairs(seed=5)
    next(ours)
    other.load_state_dict(ours.state_dict())
    before = torch.random.get_rng_state()
    for _ in range(3):
        one, two = next(ours), next(other)
        assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(next(pairs(seed=1))["ids"], next(pairs(seed=2))["ids"])


def test_what_cannot_be_paired():
    with pytest.raises(InputError, match="1 documents"):
        MaskedPairs([DOCUMENTS[0], DOCUMENTS[1][:1]], TOKENIZER, batch_size=1, length=32, seed=0)
    with pytest.raises(InputError, match=r"no \[CLS\]"):
        MaskedPairs(DOCUMENTS, byte_tokenizer(), batch_size=1, length=32, seed=0)
    with pytest.raises(InputError, match="share=0"):
        Masking(share=0)


def test_losses_are_those_of_transformers(tmp_path):
    module, batch = tiny().eval(), next(pairs())
    huggingface.save(module, tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["segments"], "token_type_ids": batch["types"]}
    both = theirs(**inputs, labels=batch["targets"], next_sentence_label=batch["following"]).loss.item()
    pair = theirs(**inputs).seq_relationship_logits
    alone = both - nn.functional.cross_entropy(pair, batch["following"]).item()
    assert masked_and_pairs(module, batch).mean.item() == pytest.approx(both, abs=1e-5)
    assert masked(module, batch).mean.item() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("objective", [masked, masked_and_pairs])
def test_gradient_by_finite_differences(objective):
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny(dim=4).double()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return objective(self.inner, batch).mean

    module, batch = Asked(), next(pairs(batch_size=2, length=10))
    used = [name for name, p in module.named_parameters() if objective is masked_and_pairs or "pool" not in name]
    used = [name for name in used if objective is masked_and_pairs or "pairs" not in name]

    def mean(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(used, values, strict=True)), (batch,))

    values = [module.get_parameter(name).detach().clone().requires_grad_() for name in used]
    assert torch.autograd.gradcheck(mean, values, eps=1e-6, atol=1e-8, fast_mode=True)


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_micro_batches_add_up(accumulate):
    whole, parts, batch = tiny().double(), tiny().double(), next(pairs())
    one = differentiate(whole, masked_and_pairs, batch, Ranks())
    many = differentiate(parts, masked_and_pairs, batch, Ranks(), accumulate=accumulate)
    assert one.targets == many.targets
    for name, mean in one.means.items():
        assert many.means[name] == pytest.approx(mean, abs=1e-6), name
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-12)


def test_both_are_learned():
    batch = next(pairs(batch_size=16))
    training = Training(steps=120, optimizer=AdamW.Config(lr=5e-3), log_every=10)
    history = train(tiny(dim=32), masked_and_pairs, Generated(lambda g: batch, seed=0), training, quiet=True).history
    assert history[0]["masked_accuracy"] < 0.7
    assert history[-1]["masked_accuracy"] == history[-1]["pair_accuracy"] == 1.0
