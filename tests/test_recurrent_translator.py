"""The LSTM translator: its attention against the equations, padding, and generation token by token."""

from __future__ import annotations

import torch

from allyouneed.core.seeds import seed_everything
from allyouneed.generate.beams import beam_search
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.requests import Request
from allyouneed.generate.translations import greedy, with_beams
from allyouneed.models.recurrent_translator import Answering, RecurrentTranslator


def model() -> RecurrentTranslator:
    seed_everything(0)
    module = RecurrentTranslator.Config(vocab_size=23, context=40, dim=8, hidden_dim=12).build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 23, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_one_step_is_the_papers_equations():
    """Bahdanau et al. 2015, sec. 3.1 and app. A.1.2, written out one row and one source word at a time in float64."""
    module, source, target = model().double(), ids(1, 5), ids(1, 1, seed=1)
    memory = module.remember(source)
    s, states = module.first(memory)[0][0], memory.states[0]
    e = torch.stack([module.score.weight[0] @ torch.tanh(module.query.weight @ s + module.key(h)) for h in states])
    alpha = e.exp() / e.exp().sum()
    context = sum(a * h for a, h in zip(alpha, states, strict=True))
    x = module.embedding(target[0, 0])
    h, _ = module.writer(torch.cat((x, context))[None], (s[None], torch.zeros_like(s)[None]))
    seen = torch.tanh(module.out(torch.cat((h[0], context, x))))
    torch.testing.assert_close(module(source, target).logits[0, 0], module.head(seen))


def test_padding_of_the_source_does_not_matter():
    module, target = model(), ids(2, 6, seed=1)
    short, long = ids(1, 4, seed=2), ids(1, 7, seed=3)
    source = torch.zeros(2, 7, dtype=torch.long)
    source[0, :4], source[1] = short, long
    together = module(source, target, (source != 0).long()).logits
    for row, alone in enumerate((short, long)):
        torch.testing.assert_close(together[row], module(alone, target[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)


def test_no_later_target_token_is_seen():
    module, source, target = model(), ids(1, 5), ids(1, 8, seed=1)
    changed = target.clone()
    changed[0, 5] = (target[0, 5] - 2) % 20 + 3
    a, b = module(source, target).logits, module(source, changed).logits
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-3


@torch.inference_mode()
def test_generation_is_argmax_of_the_forward_pass():
    module, source = model(), ids(3, 6)
    sampling = Sampling(max_new_tokens=7, temperature=0)
    steps = Engine(Answering(module)).steps([[1]] * 3, [sampling] * 3, memory=module.remember(source))
    written = [[1], [1], [1]]
    for step in steps:
        written[step.request].append(step.token)
    logits = module(source, torch.tensor(written)[:, :-1]).logits
    assert logits.argmax(-1).tolist() == [row[1:] for row in written]


@torch.inference_mode()
@torch.inference_mode()
def test_translations_of_many_are_those_of_each():
    module, sources = model(), [ids(1, length, seed=length)[0].tolist() for length in (3, 6, 4)]
    together = greedy(module, sources, start=1, end=2, most=7)
    beams = with_beams(module, sources, start=1, end=2, most=7, beams=1)
    assert beams == together
    for source, written in zip(sources, together, strict=True):
        best = module(torch.tensor([source]), torch.tensor([[1, *written]])).logits[0].argmax(-1).tolist()
        assert best[: len(written)] == written and 2 not in written
        assert len(written) == 7 or best[-1] == 2


def test_beams_find_what_is_likelier_than_greedy():
    module, source = model(), ids(1, 6)
    engine, memory = Engine(Answering(module), eos_ids=[2]), module.remember(source)
    best = beam_search(engine, [1], beams=4, max_new_tokens=6, memory=memory)
    greedy = beam_search(engine, [1], beams=1, max_new_tokens=6, memory=memory)
    assert best[0].score >= greedy[0].score - 1e-6
    tokens = torch.tensor([[1, *best[0].tokens]])
    logprobs = module(source, tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert abs(logprobs.sum().item() - best[0].logprob) < 1e-4


@torch.inference_mode()
def test_beginnings_of_unequal_length_and_interruptions():
    """What was written so far is read again with its own source, in one batch with others."""
    module, sources = model(), [ids(1, n, seed=n) for n in (4, 9, 6, 5)]
    begun = [[1], [1, 5, 9, 11], [1, 7], [1, 5, 9]]
    engine = Engine(Answering(module), config=Engine.Config(max_batch=3))
    sampling, found = Sampling(max_new_tokens=6, temperature=0), dict[int, list[int]]()
    for i in (0, 1, 2):
        engine.add(Request(ids=begun[i], sampling=sampling, memory=module.remember(sources[i])))
    steps = [*engine.step(), *engine.step()]
    engine.add(Request(ids=begun[3], sampling=sampling, memory=module.remember(sources[3]), priority=1))
    while not engine.idle:
        steps += engine.step()
    assert engine.statistics().preemptions == 1
    for step in steps:
        found.setdefault(step.request, []).append(step.token)
    for i, source in enumerate(sources):
        logits = module(source, torch.tensor([begun[i] + found[i]])).logits[0]
        assert logits[len(begun[i]) - 1 : -1].argmax(-1).tolist() == found[i]
