"""The reference of a policy: read once, taken up again, the same whoever it is, and refused where it is another's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from allyouneed.adapt import lora
from allyouneed.align import references
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import generator
from allyouneed.data.packing import answer
from allyouneed.data.preferences import Ranked
from allyouneed.models import llama
from allyouneed.models.decoder import Decoder


def policy(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16}
    return llama.architecture(vocab_size=20, context=32, **sizes).build()


def examples(count: int = 11) -> list[Ranked]:
    draw = generator(0, "examples")

    def some(least: int) -> list[int]:
        length = int(torch.randint(least, 9, (), generator=draw))
        return torch.randint(3, 20, (length,), generator=draw).tolist()

    return [Ranked((answer(p, some(1)), answer(p, some(1))), (0, 1)) for p in (some(2) for _ in range(count))]


def by_hand(module: Decoder, made: list[Ranked]) -> torch.Tensor:
    """One answer at a time."""
    found = torch.zeros(len(made), 2)
    for i, example in enumerate(made):
        for side, piece in enumerate(example.pieces):
            logprobs = module(torch.tensor([piece.ids])).logits[0].log_softmax(-1)
            found[i, side] = sum(logprobs[place, t].item() for place, t in enumerate(piece.targets) if t >= 0)
    return found


@torch.no_grad()
def test_what_is_read_is_the_reference_answer_by_answer():
    module, made = policy(), examples()
    found = references.logprobs(references.of(module), made, rows=4)
    torch.testing.assert_close(found, by_hand(module, made), rtol=1e-5, atol=1e-5)
    assert references.drift(module, made, found) <= 1e-10


def test_a_copy_stays_and_an_adapter_is_left_out():
    made = examples()
    module = policy()
    reference = references.of(module)
    before = references.logprobs(reference, made)
    with torch.no_grad():
        module.head.weight += 0.5 * torch.randn_like(module.head.weight)
    torch.testing.assert_close(references.logprobs(reference, made), before, rtol=0, atol=0)
    assert references.divergence(module, reference, made) > 0.01
    adapted = policy()
    lora.adapt(adapted, lora.Lora.Config(rank=2))
    without = references.of(adapted)
    for pair in lora.parameters(adapted).values():
        torch.nn.init.normal_(pair)
    torch.testing.assert_close(references.logprobs(without, made), before, rtol=0, atol=0)
    with without() as same:
        assert same is adapted
    assert references.divergence(adapted, without, made) > 1e-3 and adapted.training


def test_the_divergence_is_of_the_whole_distribution():
    module, made = policy(), examples(3)
    reference = references.of(module)
    assert references.divergence(module, reference, made) <= 1e-12
    with torch.no_grad():
        module.head.weight *= 20.0
        total, count = 0.0, 0
        with reference() as other:
            for piece in (piece for example in made for piece in example.pieces):
                ids = torch.tensor([piece.ids])
                p, q = (x(ids).logits[0].double().log_softmax(-1) for x in (module, other))
                kl = (p.exp() * (p - q)).sum(-1)
                learned = torch.tensor(piece.targets) >= 0
                total, count = total + kl[learned].sum().item(), count + int(learned.sum())
    assert references.divergence(module, reference, made, rows=2) == pytest.approx(total / count, rel=1e-5)


def test_reading_goes_on_and_is_not_done_twice(tmp_path, monkeypatch):
    module, made, file = policy(), examples(), tmp_path / "run" / "reference.npy"
    whole = references.logprobs(references.of(module), made)
    read, calls = references._read, []

    def counted(module, examples, chosen):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(list(chosen))
        return read(module, examples, chosen)

    monkeypatch.setattr(references, "_read", counted)
    with pytest.raises(KeyboardInterrupt):
        references.logprobs(references.of(module), made, file=file, rows=2)
    there = int(np.load(file)["digest"].any(1).sum())
    assert there == 6  # three readings
    calls.clear()
    monkeypatch.setattr(references, "_read", lambda *given: (calls.append(given[2]), read(*given))[1])
    found = references.logprobs(references.of(module), made, file=file, rows=2)
    assert sum(map(len, calls)) == len(made) - there
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    calls.clear()
    references.logprobs(references.of(module), made, file=file, rows=2)
    assert not calls


def test_numbers_of_another_model_are_read_anew(tmp_path):
    made, file = examples(), tmp_path / "reference.npy"
    references.logprobs(references.of(policy()), made, file=file)
    other = policy(seed=1)
    found = references.logprobs(references.of(other), made, file=file)
    torch.testing.assert_close(found, references.logprobs(references.of(other), made))
    more = examples(13)
    assert references.logprobs(references.of(other), more, file=file).shape == (13, 2)


def test_a_changed_example_is_read_anew_and_no_other(tmp_path, monkeypatch):
    """A long one, with prompt and targets changed alone: what is short and read first does not vouch for it."""
    module, made, file = policy(), examples(30), tmp_path / "reference.npy"
    references.logprobs(references.of(module), made, file=file)
    place = max(range(30), key=lambda i: made[i].longest)
    first, second = made[place].pieces
    made[place] = Ranked((first, answer(second.ids[:1], second.ids[1:][::-1])), (0, 1))
    read, calls = references._read, []
    monkeypatch.setattr(references, "_read", lambda *given: (calls.append(given[2]), read(*given))[1])
    found = references.logprobs(references.of(module), made, file=file)
    assert calls == [[place]]
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(module, made), rtol=1e-5, atol=1e-5)


def test_a_reference_that_differs_where_few_examples_look_is_read_anew(tmp_path):
    """One token's embedding: the shortest examples have nothing of it."""
    made, file = examples(30), tmp_path / "reference.npy"
    module, other = policy(), policy()
    with torch.no_grad():
        other.embedding.weight[made[-1].pieces[0].ids[0]] += 1.0
    references.logprobs(references.of(module), made, file=file)
    found = references.logprobs(references.of(other), made, file=file)
    torch.testing.assert_close(found, references.logprobs(references.of(other), made), rtol=0, atol=0)


def test_another_reference_is_refused_before_training():
    made = examples()
    known = references.logprobs(references.of(policy(seed=1)), made)
    with pytest.raises(InputError, match="nats from its reference before training"):
        references.drift(policy(), made, known)
