"""Adapters by request: rows of several in one pass, beside models into which one was merged; nothing crosses over."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import pytest
import torch
from adapters import CONFIGS, MIXES, merged, with_adapters
from test_native_reader import EXAMPLES, build, cache, model_of, packed, storage_of, table, tokens, whole  # noqa: F401
from torch import Tensor, nn

from allyouneed.adapt.layers import Lora, LoraLinear
from allyouneed.adapt.lora import adapt, disabled, merge, unload, unmerge, use
from allyouneed.adapt.rows import Mix, chosen, current
from allyouneed.core.errors import InputError
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate.beams import beam_search
from allyouneed.generate.drafting import Draft, EarlyExit
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.generate.native_reader import native_reader
from allyouneed.generate.reading import Piece, Reader, TorchReader
from allyouneed.generate.requests import Request
from allyouneed.generate.speculation import PromptLookup, Speculator
from allyouneed.models import llama
from allyouneed.models.checkpoints.adapters import load_adapter, save_adapter
from allyouneed.models.decoder import Decoder
from allyouneed.models.lowering import lowered

GREEDY = Sampling(max_new_tokens=12, temperature=0.0, ignore_eos=True)
LENGTHS = (41, 1, 9, 17, 2)  # of a prompt for each mix
NAMES = (None, *CONFIGS)


def adapted(name: str, *, packed_base: bool = False) -> Decoder:
    module = model_of(name)
    return with_adapters(packed(module) if packed_base else module)


def native(module: Decoder) -> Reader:
    found = native_reader(module, storage_of(module, blocks=250))
    assert found is not None
    return found


def slow(module: Decoder) -> Reader:
    return TorchReader(module, storage_of(module, blocks=250))


READERS = {"native": native, "torch": slow}


def read_mixed(reader: Reader) -> list[Tensor]:
    """All logits of a prompt for each mix, read in one pass, and of the second of two tokens more."""
    asked = list(enumerate(zip(LENGTHS, MIXES, strict=True)))
    prompts = [Piece(tokens(n, seed=i), table(i, n + 2), 0, wanted=n, adapters=mix) for i, (n, mix) in asked]
    ones = [Piece([i], table(i, n + 2), n, wanted=0, adapters=mix) for i, (n, mix) in asked]
    twos = [Piece([40 + i], table(i, n + 2), n + 1, wanted=1, adapters=mix) for i, (n, mix) in asked]
    first = reader.read(prompts).split(LENGTHS)
    reader.read(ones)
    return [torch.cat((rows, last[None])) for rows, last in zip(first, reader.read(twos), strict=True)]


def alone(module: Decoder) -> list[Tensor]:
    """The same logits of each mix by itself, from weights into which it is merged, in float64."""
    found = []
    for i, (n, mix) in enumerate(zip(LENGTHS, MIXES, strict=True)):
        logits = whole(merged(module, mix).double(), [*tokens(n, seed=i), i, 40 + i])
        found.append(torch.cat((logits[:n], logits[-1:])))
    return found


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", ["llama", "wide", "gpt2", "gpt_neox", "bloom", "gpt_neo"])
def test_rows_of_several_adapters_in_one_pass_equal_merged_models(name: str, kind: str) -> None:
    module = adapted(name)
    wanted, found = alone(module), read_mixed(READERS[kind](module))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5
    assert all((wanted[0][0] - other[0]).abs().max() > 1e-2 for other in wanted[1:])


@pytest.mark.parametrize("kind", READERS)
def test_over_packed_weights(kind: str, build: str, threads: int) -> None:  # noqa: F811
    module = adapted("wide", packed_base=True)
    for one, other in zip(read_mixed(READERS[kind](module)), alone(module), strict=True):
        assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", READERS)
def test_a_head_of_its_own_is_adapted_too(kind: str) -> None:
    module = with_adapters(
        model_of("llama"),
        {name: Lora.Config(rank=3, targets=("head", "k")) for name in CONFIGS}
        | {"everywhere": Lora.Config(rank=2, targets=("head",))},
    )
    for one, other in zip(read_mixed(READERS[kind](module)), alone(module), strict=True):
        assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("target", ["embedding", "positions.embedding"])
def test_adapted_tables_are_read_by_pytorch(target: str) -> None:
    """One row of positions, which all rows of the pass share, included."""
    module = model_of("gpt2")
    module.config = module.config.replace(tied=False)
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())
    with_adapters(module, dict.fromkeys(CONFIGS, Lora.Config(rank=3, targets=(target,))))
    for part in module.modules():
        if isinstance(part, Lora):
            nn.init.normal_(part.A, std=0.3)
    assert lowered(module) is None
    for one, other in zip(read_mixed(slow(module)), alone(module), strict=True):
        assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("whole_layer", ["embedding", "head"])
def test_layers_that_an_adapter_brings_whole_stand_for_the_base_s_in_its_rows(whole_layer: str) -> None:
    module = with_adapters(
        model_of("llama"), CONFIGS | {"deep": Lora.Config(rank=4, targets=("up",), whole=(whole_layer,))}
    )
    with torch.no_grad():
        for parameter in module.get_submodule(whole_layer).adapters["deep"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert lowered(module) is None
    mixes = [mix for mix in MIXES if mix != MIXES[-1]]  # such a layer cannot be weighed
    pieces = [Piece(tokens(9, seed=i), table(i % 4, 9), 0, wanted=9, adapters=mix) for i, mix in enumerate(mixes)]
    found = slow(module).read(pieces).split(9)
    for i, (one, mix) in enumerate(zip(found, mixes, strict=True)):
        wanted = merged(module, mix).double()(torch.tensor([tokens(9, seed=i)])).logits[0]
        assert (one - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["wide", "gpt2"])
def test_rows_have_the_same_bits_alone_and_beside_others(name: str, build: str, threads: int) -> None:  # noqa: F811
    """And rows without an adapter those of a module that has none."""
    plain, module = model_of(name), adapted(name)
    found = read_mixed(native(module))
    for i, (n, mix) in enumerate(zip(LENGTHS, MIXES, strict=True)):
        one = native(module if mix else plain)
        rows = [
            one.read([Piece([token], table(i, n), at, wanted=1, adapters=mix)])
            for at, token in enumerate(tokens(n, seed=i))
        ]
        assert torch.equal(torch.cat(rows), found[i][:n])


def texts(
    engine: Engine, asked: Sequence[tuple[list[int], str | None]], sampling: Sampling = GREEDY
) -> list[list[int]]:
    """What an engine writes after each prompt, all of them asked for at once."""
    numbers = [engine.add(Request(ids=ids, sampling=sampling, adapter=adapter)) for ids, adapter in asked]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.idle:
        for step in engine.step():
            found[step.request].append(step.token)
    return list(found.values())


def mix_named(name: str | None) -> Mix:
    return () if name is None else ((name, 1.0),)


DRAWN = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=7, ignore_eos=True)
ASKED = [(tokens(18 + 4 * i, seed=0), name) for i in range(2) for name in NAMES]  # they begin alike
ENGINES = {
    "whole": Engine.Config(blocks=60, max_batch=8),
    "in chunks": Engine.Config(blocks=60, max_batch=8, chunk=7),
    "interrupted": Engine.Config(blocks=40, block_size=4, max_batch=8),
    "a few at a time": Engine.Config(blocks=30, max_batch=3),
    "unshared": Engine.Config(blocks=60, max_batch=8, share_prefixes=False),
}


@pytest.mark.parametrize("way", [*ENGINES, "on PyTorch"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_requests_in_one_batch_equal_single_runs_of_merged_models(
    way: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = adapted("llama")
    if way == "on PyTorch":
        monkeypatch.setattr("allyouneed.nn.native.library", lambda: None)
    engine = Engine(module, config=ENGINES.get(way, ENGINES["whole"]))
    found = texts(engine, ASKED, sampling)
    for one, (ids, name) in zip(found, ASKED, strict=True):
        assert one == texts(Engine(merged(module, mix_named(name))), [(ids, None)], sampling)[0]
    assert len({tuple(one) for one in found[:4]}) == 4
    assert texts(engine, ASKED[::-1], sampling)[::-1] == found  # what was kept is found, by the right ones
    if way == "interrupted":
        assert engine.statistics().preemptions


def speculators(module: Decoder) -> dict[str, Speculator]:
    return {"lookup": PromptLookup(PromptLookup.Config(shortest=1)), "early exit": EarlyExit(1), "draft": Draft(module)}


@pytest.mark.parametrize("guess", ["lookup", "early exit", "draft"])
def test_guesses_do_not_change_what_an_adapter_says(guess: str) -> None:
    module = adapted("llama")
    engine = Engine(module, config=ENGINES["whole"], speculator=speculators(adapted("llama"))[guess])
    assert texts(engine, ASKED) == texts(Engine(module, config=ENGINES["whole"]), ASKED)
    assert engine.statistics().drafts


def test_early_exit_reads_with_the_request_s_adapter() -> None:
    """The first of two layers guesses, and the second changes nothing: drafts are all kept only if both read alike."""
    module = adapted("llama")
    for part in (module.blocks[1].mixer.out, module.blocks[1].channel.out):
        part.base.weight.data.zero_()
        for one in part.adapters.values():
            one.B.data.zero_()
    engine = Engine(module, config=ENGINES["whole"], speculator=EarlyExit(1))
    texts(engine, ASKED)
    statistics = engine.statistics()
    assert statistics.kept == statistics.drafts > 0


def first_cached(engine: Engine, ids: list[int], adapter: str | None) -> int:
    number = engine.add(Request(ids=ids, sampling=GREEDY, adapter=adapter))
    steps = []
    while not engine.idle:
        steps += engine.step()
    assert steps[0].request == number
    return steps[0].cached


def test_prefixes_are_shared_within_an_adapter_only() -> None:
    module, ids = adapted("llama"), tokens(33)
    engine = Engine(module, config=Engine.Config(blocks=60))
    assert [first_cached(engine, ids, name) for name in NAMES] == [0, 0, 0, 0]
    assert [first_cached(engine, ids, name) for name in NAMES] == [32, 32, 32, 32]
    use(module, {"deep": 0.5})
    assert [first_cached(engine, ids, name) for name in (None, None, "deep")] == [0, 32, 32]


def test_a_request_that_names_none_is_answered_by_those_in_use_when_it_was_added() -> None:
    module, ids = adapted("llama"), tokens(20)
    engine, found = Engine(module, config=Engine.Config(blocks=60)), {}
    use(module, {"deep": 0.5, "narrow": 1.0})
    for key, context in {"in use": None, "disabled": disabled(module)}.items():
        if context is None:
            found[key] = engine.add(Request(ids=ids, sampling=GREEDY))
        else:
            with context:
                found[key] = engine.add(Request(ids=ids, sampling=GREEDY))
    use(module, {"everywhere": 1.0})
    written: dict[int, list[int]] = {number: [] for number in found.values()}
    while not engine.idle:
        for step in engine.step():
            written[step.request].append(step.token)
    wanted = {"in use": (("deep", 0.5), ("narrow", 1.0)), "disabled": ()}
    for key, mix in wanted.items():
        assert written[found[key]] == texts(Engine(merged(module, mix)), [(ids, None)])[0], key


def test_beams_are_read_by_those_in_use() -> None:
    module, ids = adapted("llama"), tokens(12)
    use(module, {"deep": 1.0})
    found = beam_search(Engine(module), ids, beams=3, max_new_tokens=6)
    wanted = beam_search(Engine(merged(module, (("deep", 1.0),))), ids, beams=3, max_new_tokens=6)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


def test_adapters_that_come_later_and_those_that_are_trained_on() -> None:
    module, ids = adapted("llama"), tokens(20)
    engine = Engine(module, config=Engine.Config(blocks=60))
    texts(engine, [(ids, "deep")])
    adapt(module, Lora.Config(rank=2, targets="all-linear"), "later")
    use(module, {})
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, LoraLinear) and "later" in layer.adapters:
                layer.adapters["later"].B.normal_(std=0.3)
    assert texts(engine, [(ids, "later")]) == texts(Engine(merged(module, mix_named("later"))), [(ids, None)])
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, LoraLinear) and "later" in layer.adapters:
                layer.adapters["later"].B.mul_(-1)
    engine.forget()
    assert texts(engine, [(ids, "later")]) == texts(Engine(merged(module, mix_named("later"))), [(ids, None)])


def test_adapters_that_cannot_answer_are_refused_by_name() -> None:
    module = adapted("llama")
    with pytest.raises(InputError, match="unknown adapter 'dep'; did you mean 'deep'"):
        Engine(module).add(Request(ids=[1], sampling=GREEDY, adapter="dep"))
    with pytest.raises(InputError, match="unknown adapter 'deep'"):
        Engine(model_of("llama")).add(Request(ids=[1], sampling=GREEDY, adapter="deep"))


def test_what_one_thread_chose_no_other_sees() -> None:
    seen = []
    with chosen([(("deep", 1.0),)]):
        other = threading.Thread(target=lambda: seen.append(current()))
        other.start()
        other.join()
        assert current() is not None
    assert seen == [None]
    assert current() is None


# Merging and training under an engine


def says(engine: Engine, ids: list[int], adapter: str | None = None) -> list[int]:
    return texts(engine, [(ids, adapter)])[0]


@pytest.mark.parametrize("way", ["native", "torch"])
def test_an_engine_sees_that_adapters_are_merged_and_taken_out_again(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it kept of a prompt that begins alike."""
    if way == "torch":
        monkeypatch.setattr("allyouneed.nn.native.library", lambda: None)
    module, ids = adapted("llama"), tokens(35)
    wanted = {name: says(Engine(merged(module, mix_named(name))), ids) for name in (None, "everywhere")}
    engine = Engine(module, config=Engine.Config(blocks=60))
    assert says(engine, ids) == wanted[None] != wanted["everywhere"]
    use(module, {"everywhere": 1.0})
    merge(module)
    fresh = Engine(module, config=Engine.Config(blocks=60))
    for one in (engine, fresh):
        assert says(one, ids) == wanted["everywhere"]
    with pytest.raises(InputError, match="is merged; unmerge it first"):
        says(engine, ids, "everywhere")
    unmerge(module)
    use(module, {})
    for one in (engine, fresh):
        assert says(one, ids, "everywhere") == wanted["everywhere"] and says(one, ids) == wanted[None]


def test_a_request_whose_adapter_is_merged_before_it_is_read_is_not_answered_by_others() -> None:
    module = adapted("llama")
    engine = Engine(module, config=Engine.Config(blocks=60))
    engine.add(Request(ids=[1, 2, 3], sampling=GREEDY, adapter="deep"))
    use(module, {"everywhere": 1.0})
    merge(module)
    with pytest.raises(InputError, match="was merged since"):
        engine.step()


def test_what_training_writes_into_an_adapter_is_seen() -> None:
    module, ids = adapted("llama"), tokens(35)
    engine = Engine(module, config=Engine.Config(blocks=60))
    says(engine, ids, "everywhere")
    use(module, {"everywhere": 1.0})
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.3)
    module(torch.tensor([ids])).logits.square().sum().backward()
    optimizer.step()
    use(module, {})
    wanted = says(Engine(merged(module, mix_named("everywhere"))), ids)
    assert says(engine, ids, "everywhere") == wanted
    assert first_cached(engine, ids, "everywhere") == 32


def test_as_many_mixes_as_rows_are_needed() -> None:
    module = adapted("llama")
    with pytest.raises(ValueError, match="3 rows of a layer, adapters chosen for 2"), chosen([mix_named("deep")] * 2):
        module(torch.ones(3, 4, dtype=torch.long))


def test_adapters_with_dropout_and_on_the_head_score_and_embed(tmp_path) -> None:
    lm = LocalModel(llama.EXAMPLE.replace(vocab_size=257, tied=False).build().eval(), byte_tokenizer(), "it")
    with_adapters(lm.module, {"a": Lora.Config(rank=2, dropout=0.4, targets=("q", "head"))})
    save_adapter(lm.module, tmp_path, "a", base="it")
    plain = copy.deepcopy(lm.module)
    unload(plain)
    load_adapter(plain, tmp_path, "b")
    use(plain, {})
    found = LocalModel(plain, byte_tokenizer(), "it").with_adapter("b")
    alone = LocalModel(merged(lm.module, mix_named("a")), byte_tokenizer(), "it")
    assert found.score(["hello"], [" world"]) == pytest.approx(alone.score(["hello"], [" world"]), abs=1e-4)
    assert abs(found.embed(["hello"]) - alone.embed(["hello"])).max() <= 1e-5
    steps = [
        [step.logprob for step in engine.steps([[1, 2, 3]], [GREEDY], adapter="b")] for engine in [found.engine] * 2
    ]
    assert steps[0] == steps[1]
