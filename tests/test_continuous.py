"""Whatever way a request goes through the engine, its tokens are those of `transformers.generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import oracles
import pytest
import torch
import transformers

import allyouneed as ayn
from allyouneed.data import materials
from allyouneed.generate.drafting import Draft, EarlyExit, Length, first_layers
from allyouneed.generate.engine import Engine, Statistics
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.reading import TorchReader
from allyouneed.generate.requests import Request
from allyouneed.generate.speculation import PromptLookup, Speculator
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder_decoder import Answering

NEW, SMOLLM2 = 8, "smollm2-135m-instruct"
MANY, FEWER = 64, 16  # prompts


def expected(theirs: transformers.PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """What theirs generate in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    out = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, width:].tolist()


def greedy(new: int = NEW) -> Sampling:
    return Sampling(max_new_tokens=new, temperature=0, ignore_eos=True)


def collect(engine: Engine, numbers: Sequence[int]) -> list[list[int]]:
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.idle:
        for step in engine.step():
            found[step.request].append(step.token)
    return [found[number] for number in numbers]


def engine_of(module: Decoder, **config: object) -> Engine:
    return Engine(module, config=Engine.Config(**config))  # type: ignore[arg-type]


def freed(engine: Engine) -> bool:
    return engine.idle and engine.statistics().free == engine.statistics().blocks


def alone(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    engine = engine_of(module, share_prefixes=False)
    return [collect(engine, [engine.add(Request(ids=ids, sampling=greedy(new)))])[0] for ids in prompts]


def mixed(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """All at once, more than may run."""
    engine = engine_of(module, max_batch=7, share_prefixes=False)
    found = collect(engine, [engine.add(Request(ids=ids, sampling=greedy(new))) for ids in prompts])
    assert freed(engine) and engine.statistics().preemptions == 0
    return found


def chunked(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    engine = engine_of(module, chunk=7, block_size=4, max_batch=5)
    return collect(engine, [engine.add(Request(ids=ids, sampling=greedy(new))) for ids in prompts])


def preempted(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """So few blocks that two of the longest do not fit, and no block is found again."""
    longest = max(map(len, prompts)) + new
    engine = engine_of(module, block_size=2, blocks=-(-longest // 2) + 6, share_prefixes=False)
    found = collect(engine, [engine.add(Request(ids=ids, sampling=greedy(new))) for ids in prompts])
    statistics = engine.statistics()
    print(f"{statistics.preemptions} interruptions of {len(prompts)} requests")
    assert freed(engine) and statistics.preemptions > len(prompts) // 8
    assert statistics.read > sum(len(ids) + new - 1 for ids in prompts)  # what was lost is read again
    return found


def shared(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Each after another that begins with it, so that nearly all of it is found."""
    engine = engine_of(module, block_size=4)
    ordered = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    before = engine.statistics().shared
    found = dict[int, list[int]]()
    for i in ordered:
        collect(engine, [engine.add(Request(ids=[*prompts[i], 5, 6, 7], sampling=greedy(1)))])
        (found[i],) = collect(engine, [engine.add(Request(ids=prompts[i], sampling=greedy(new)))])
    shared = engine.statistics().shared - before
    assert shared >= sum((len(ids) - 1) // 4 * 4 for ids in prompts)
    return [found[i] for i in range(len(prompts))]


def forked(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Two of each prompt: one is read, the other holds what it holds."""
    engine = engine_of(module, block_size=4, max_batch=24)
    numbers = [engine.add(Request(ids=ids, sampling=greedy(new))) for ids in prompts for _ in range(2)]
    found = collect(engine, numbers)
    assert found[::2] == found[1::2]
    assert freed(engine) and engine.statistics().shared >= sum((len(ids) - 1) // 4 * 4 for ids in prompts)
    return found[::2]


def arriving(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """One more at each step."""
    engine, numbers, found = engine_of(module, max_batch=6, chunk=16), [], dict[int, list[int]]()
    while len(numbers) < len(prompts) or not engine.idle:
        if len(numbers) < len(prompts):
            numbers.append(engine.add(Request(ids=prompts[len(numbers)], sampling=greedy(new))))
        for step in engine.step():
            found.setdefault(step.request, []).append(step.token)
    assert freed(engine)
    return [found[number] for number in numbers]


def guessed(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Drafts of every kind, in mixed batches, chunks and after interruptions: all give the same."""
    found = [judged(module, prompts, new, one)[0] for one in (PromptLookup(), Draft(module), EarlyExit(1))]
    assert found[0] == found[1] == found[2]
    return found[0]


def exited(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Two thirds of the layers guess."""
    found, _ = judged(module, prompts, new, EarlyExit(2 * module.config.num_layers // 3))
    return found


def looked_up(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Drafts after a single token that agrees: most are wrong, and none may leave anything behind."""
    found, statistics = judged(module, prompts, new, PromptLookup(PromptLookup.Config(shortest=1)))
    assert 0 < statistics.kept < statistics.drafts
    return found


def drafted(module: Decoder, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Another model, with a cache of its own: most of the layers as they are."""
    draft = Draft(first_layers(module, 5 * module.config.num_layers // 6), Length(least=0.1))
    found, statistics = judged(module, prompts, new, draft)
    assert 0 < statistics.kept < statistics.drafts
    return found


def judged(
    module: Decoder, prompts: list[list[int]], new: int, speculator: Speculator
) -> tuple[list[list[int]], Statistics]:
    longest = max(map(len, prompts)) + new
    config = Engine.Config(block_size=4, blocks=-(-longest // 4) + 8, max_batch=7, chunk=16)
    engine = Engine(module, config=config, speculator=speculator)
    found = collect(engine, [engine.add(Request(ids=ids, sampling=greedy(new))) for ids in prompts])
    assert freed(engine) and engine.statistics().drafts > 0
    return found, engine.statistics()


Path = Callable[[Decoder, list[list[int]], int], list[list[int]]]
PATHS: list[Path] = [alone, mixed, chunked, preempted, shared, forked, arriving, guessed]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neo", "bloom"])
def case(request, tmp_path_factory):
    """One of ours, prompts of 1 to 40 tokens, and what theirs makes of them."""
    theirs = oracles.ALL[request.param]()
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    source = torch.Generator().manual_seed(1)
    lengths = [1, 2, 15, 16, 17, 40, *torch.randint(1, 40, (MANY - 6,), generator=source).tolist()]
    prompts = [torch.randint(3, 97, (n,), generator=source).tolist() for n in lengths]
    return huggingface.load(folder), prompts, expected(theirs, prompts, NEW)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_tokens_equal_theirs(case, path):
    module, prompts, wanted = case
    assert path(module, prompts, NEW) == wanted


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_tokens_equal_theirs_where_pytorch_reads(case, path, monkeypatch):
    """What every model without a program is read with; some prompts, since it takes longer."""
    monkeypatch.setattr("allyouneed.generate.native_reader.native_reader", lambda module, storage: None)
    read, passes = TorchReader.read, list[int]()
    monkeypatch.setattr(TorchReader, "read", lambda self, pieces: passes.append(len(pieces)) or read(self, pieces))
    module, prompts, wanted = case
    assert path(module, prompts[:FEWER], NEW) == wanted[:FEWER] and passes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_that_end_with_the_context_are_padded_no_further(family, tmp_path):
    """Rows read together begin at different places; what pads one of them must not stand beyond all positions."""
    theirs = oracles.ALL[family]()
    theirs.save_pretrained(tmp_path)
    module, source = huggingface.load(tmp_path), torch.Generator().manual_seed(4)
    prompts = [
        torch.randint(3, 97, (n,), generator=source).tolist() for n in (*range(38, 63), *range(10, 35)) for _ in "ab"
    ]
    wanted = expected(theirs, prompts, 2)
    for chunk in (30, 64, 200):
        engine = engine_of(module, chunk=chunk, max_batch=50, share_prefixes=False)
        found = dict[int, list[int]]()
        numbers = []
        while len(numbers) < len(prompts) or not engine.idle:
            numbers += [engine.add(Request(ids=ids, sampling=greedy(2))) for ids in prompts[len(numbers) :][:3]]
            for step in engine.step():
                found.setdefault(step.request, []).append(step.token)
        assert [found[number] for number in numbers] == wanted


WORDS = "river under an old bridge carried boats of salt and copper while children counted 17 stones in 2031"


@pytest.fixture(scope="module")
def smollm2():
    """The real model, 84 short prompts, and what theirs makes of them."""
    lm, path = ayn.load(SMOLLM2), materials.path(SMOLLM2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    openings = ("The", "Once there was", "def f(x):", "In short,", "Q: Who is", "Le chat", "import")
    texts = [f"{opening} {WORDS[5 * i : 5 * i + 6 + 4 * (i % 5)]}" for i in range(12) for opening in openings]
    prompts = [lm.tokenizer.encode(text) for text in texts]
    return lm.module, prompts, expected(theirs.eval(), prompts, 6)


@pytest.mark.parametrize("path", [mixed, chunked, preempted, forked, exited], ids=lambda path: path.__name__)
def test_the_real_models_tokens_equal_theirs(smollm2, path):
    module, prompts, wanted = smollm2
    assert len(prompts) >= 80
    assert path(module, prompts, 6) == wanted


@pytest.mark.parametrize("path", [shared, looked_up, drafted], ids=lambda path: path.__name__)
def test_the_real_models_tokens_equal_theirs_for_some(smollm2, path):
    """Paths that take longer."""
    module, prompts, wanted = smollm2
    assert path(module, prompts[:28], 6) == wanted[:28]


def test_recurrent_models_come_and_go(tmp_path):
    theirs = oracles.rwkv()
    theirs.save_pretrained(tmp_path)
    module, source = huggingface.load(tmp_path), torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 30, (20,), generator=source).tolist()
    prompts = [torch.randint(3, 97, (n,), generator=source).tolist() for n in lengths]
    wanted = [expected(theirs, [ids], NEW)[0] for ids in prompts]
    for path in (alone, mixed, chunked, arriving):
        assert path(module, prompts, NEW) == wanted, path.__name__
    engine = engine_of(module, max_batch=40)  # all run at once, so that each pair can be read as one
    found = collect(engine, [engine.add(Request(ids=ids, sampling=greedy())) for ids in prompts for _ in range(2)])
    assert found[::2] == found[1::2] == wanted and engine.statistics().shared == sum(lengths)


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_answers_come_and_go_each_with_its_source(family, tmp_path):
    """Sources of unequal length arrive one by one; targets begin alike and must not be taken for one another."""
    theirs = getattr(oracles, family)()
    theirs.save_pretrained(tmp_path)
    module, source = huggingface.load(tmp_path), torch.Generator().manual_seed(3)
    sources = [torch.randint(3, 97, (1, 1 + 5 * i % 13), generator=source) for i in range(16)]
    start = theirs.config.decoder_start_token_id
    wanted = [
        theirs.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 1:].tolist()
        for ids in sources
    ]
    engine, numbers, found = Engine(Answering(module), config=Engine.Config(max_batch=5)), [], dict[int, list[int]]()
    while len(numbers) < len(sources) or not engine.idle:
        for ids in sources[len(numbers) : len(numbers) + 1]:
            with torch.inference_mode():
                memory = module.remember(ids)
            numbers.append(engine.add(Request(ids=[start], sampling=greedy(), memory=memory)))
        for step in engine.step():
            found.setdefault(step.request, []).append(step.token)
    assert [found[number] for number in numbers] == wanted and freed(engine)
