"""RWKV-4: the weighted sum against its equation in float64, states in place of keys, the authors' initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import oracles
import pytest
import torch
from torch import Tensor

from allyouneed.cli import main
from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.data.batches import Windows
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate import local
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.models import llama, rwkv
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.loading import save
from allyouneed.models.decoder import Decoder
from allyouneed.models.recurrent import RecurrentModel
from allyouneed.nn import native
from allyouneed.nn.caches import Cache
from allyouneed.nn.ffn import MLP
from allyouneed.nn.recurrent import GRU, LSTM, Recurrent
from allyouneed.nn.rwkv import Following
from allyouneed.nn.sandwich import Sandwich
from allyouneed.nn.wkv import empty, step, wkv
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import rwkv as paper
from allyouneed.train.loop import Training, train

Given = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["native", "chunks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Either way that many tokens are read."""
    if request.param == "native" and native.library() is None:
        pytest.fail("no C++ compiler")
    if request.param == "chunks":
        monkeypatch.setattr(native, "library", lambda: None)
    yield request.param


def given(rows: int, length: int, dim: int, *, scale: float = 1.0, seed: int = 0) -> Given:
    """w over the range of the published models, u, and keys and values."""
    g = torch.Generator().manual_seed(seed)
    w = torch.linspace(-5, 3, dim).exp()
    k, v = (torch.randn(rows, length, dim, generator=g) for _ in range(2))
    return w, torch.randn(dim, generator=g), scale * k, v


def twin(w: Tensor, u: Tensor, k: Tensor, v: Tensor, begins: Tensor | None = None) -> Tensor:
    """The equation as it stands, in float64: a softmax over all tokens up to each, channel by channel."""
    w, u, k, v = (x.double() for x in (w, u, k, v))
    rows = []
    for b in range(len(k)):
        seen, first = [], 0
        for t in range(k.shape[1]):
            first = t if begins is not None and begins[b, t] else first
            ages = torch.arange(t - 1 - first, -1, -1, dtype=torch.double)[:, None]
            exponents = torch.cat((k[b, first:t] - ages * w, (u + k[b, t])[None]))
            seen.append((exponents.softmax(0) * v[b, first : t + 1]).sum(0))
        rows.append(torch.stack(seen))
    return torch.stack(rows)


def worst(found: Tensor, wanted: Tensor) -> float:
    return (found - wanted).abs().max().item()


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("begins", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100])
def test_what_is_seen_and_its_gradient_are_the_equations(path: str, length: int, begins: bool) -> None:
    inputs = given(2, length, 37)
    marks = (torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.1) if begins else None
    weight = torch.randn(2, length, 37, generator=torch.Generator().manual_seed(2))
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = twin(*exact, marks)
    gradients = torch.autograd.grad((wanted * weight).sum(), exact)
    leaves = [x.clone().requires_grad_() for x in inputs]
    found, _ = wkv(*leaves, begins=marks)
    assert worst(found, wanted) <= 1e-6
    for one, other in zip(torch.autograd.grad((found * weight).sum(), leaves), gradients, strict=True):
        assert worst(one, other) <= 1e-5 * max(1.0, other.abs().max().item())


def test_the_gradient_in_float64() -> None:
    inputs = [x.double().requires_grad_() for x in given(2, 37, 3)]
    marks = torch.zeros(2, 37, dtype=torch.bool)
    marks[0, 11] = marks[1, 32] = True
    assert torch.autograd.gradcheck(lambda *x: wkv(*x, begins=marks)[0], inputs, fast_mode=True)


def long_given(kind: str) -> Given:
    w, u, k, v = given(2, 4096, 24)
    if kind == "slow":  # channels that have forgotten nothing of a key of 60 when one of −60 comes
        w = torch.full_like(w, -5.0).exp()
    scale = {"of one": 1, "of three": 3, "of twenty": 20, "slow": 60}[kind]
    return w, u, (scale * k).clamp(-60, 60), v


KINDS_OF_KEYS = ("of one", "of three", "of twenty", "slow")


@pytest.mark.parametrize("kind", KINDS_OF_KEYS)
def test_4096_tokens_in_float32_are_those_in_float64(path: str, kind: str) -> None:
    """Near what float32 has to give: beyond 64 nw and p − k − nw are each rounded by up to 4e-6, once and not at every
    token, and a mean of two values that are 4 apart moves by as much as a weight's relative error.
    """
    inputs = long_given(kind)
    weight = torch.randn(2, 4096, 24, generator=torch.Generator().manual_seed(1))
    exact = [x.double().requires_grad_() for x in inputs]
    wanted, _ = wkv(*exact)
    assert worst(wanted[:, :300], twin(*(x if x.dim() == 1 else x[:, :300] for x in inputs))) <= 1e-10
    leaves = [x.clone().requires_grad_() for x in inputs]
    found, _ = wkv(*leaves)
    assert worst(found, wanted) <= 1e-5
    gradients = (torch.autograd.grad((y * weight).sum(), x) for y, x in ((found, leaves), (wanted, exact)))
    for one, other in zip(*gradients, strict=True):
        assert worst(one, other) <= 1e-5 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("kind", KINDS_OF_KEYS)
def test_parallel_and_recurrent_agree_over_4096_tokens(path: str, kind: str) -> None:
    w, u, k, v = long_given(kind)
    parallel, after = wkv(w, u, k, v)
    state, seen = empty(2, 24), []
    for t in range(4096):
        one, state = step(w, u, k[:, t], v[:, t], state)
        seen.append(one)
    assert worst(parallel, torch.stack(seen, 1)) <= 1e-5
    for a, b in zip(after.unbind(1), state.unbind(1), strict=True):
        assert ((a - b).abs() / b.abs().clamp(min=1)).max() <= 1e-5


def test_keys_of_sixty_overflow_nowhere(path: str) -> None:
    w, u, k, v = given(2, 200, 24)
    k = 60 * k.sign()
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    found, after = wkv(*leaves)
    assert worst(found, twin(w, u, k, v)) <= 1e-5
    assert after.isfinite().all()
    found.sum().backward()
    exact = [x.double().requires_grad_() for x in (w, u, k, v)]
    twin(*exact).sum().backward()
    for leaf, one in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and one.grad is not None
        assert leaf.grad.isfinite().all() and worst(leaf.grad, one.grad) <= 1e-5 * max(1.0, one.grad.abs().max().item())
    state = empty(2, 24)
    for t in range(200):
        one, state = step(w, u, k[:, t], v[:, t], state)
        assert worst(one, found[:, t]) <= 1e-5


def test_pieces_and_counts_leave_the_state_of_the_tokens_read(path: str) -> None:
    w, u, k, v = given(3, 70, 8)
    whole, after = wkv(w, u, k, v)
    state, pieces = None, []
    for piece in (slice(0, 1), slice(1, 45), slice(45, 70)):
        seen, state = wkv(w, u, k[:, piece], v[:, piece], state)
        pieces.append(seen)
    assert worst(torch.cat(pieces, 1), whole) <= 1e-6
    assert state is not None and worst(state, after) <= 1e-5
    counts = torch.tensor([70, 0, 33])
    _, counted = wkv(w, u, k, v, counts=counts)
    for row, count in enumerate(counts.tolist()):
        alone = wkv(w, u, k[row : row + 1, :count], v[row : row + 1, :count])[1] if count else empty(1, 8)
        assert worst(counted[row], alone[0]) <= 1e-5


def test_what_begins_again_begins_from_the_state_given(path: str) -> None:
    w, u, k, v = given(1, 20, 8)
    _, state = wkv(w, u, k[:, :10], v[:, :10])
    begins = torch.zeros(1, 10, dtype=torch.bool)
    begins[0, 6] = True
    seen, _ = wkv(w, u, k[:, 10:], v[:, 10:], state, begins)
    other = wkv(w, u, k[:, 16:], v[:, 16:], state)[0]
    assert worst(seen[:, 6:], other) <= 1e-6


def test_marks_of_one_row_are_those_of_all(path: str) -> None:
    w, u, k, v = given(4, 20, 8)
    marks = torch.zeros(1, 20, dtype=torch.bool)
    marks[0, 7] = True
    found, wanted = [], []
    for begins, results in ((marks, found), (marks.expand(4, 20).clone(), wanted)):
        leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
        seen, after = wkv(*leaves, begins=begins)
        results += [seen, after, *torch.autograd.grad((seen * v).sum(), leaves)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_lies_outside_of_the_tokens_is_not_read(path: str, model: Decoder) -> None:
    w, u, k, v = given(3, 5, 8)
    for counts in ([1, 2, 6], [1, -1, 2], [1, 2]):
        with pytest.raises(InputError, match=r"counts=.*: for each of 3 rows one from 0 to 5 is wanted"):
            wkv(w, u, k, v, counts=torch.tensor(counts))
    for shape in ((2, 5), (3, 4), (1, 6)):
        with pytest.raises(InputError, match="for 3 rows of 5 tokens; give as many"):
            wkv(w, u, k, v, begins=torch.ones(shape, dtype=torch.bool))
    for wrong in (empty(2, 8), empty(3, 7), empty(3, 8)[:, :3]):
        with pytest.raises(AssertionError):
            wkv(w, u, k, v, wrong)
    segments = torch.tensor([[1] * 9 + [2] * 11])
    with torch.no_grad():
        found = model(ids(4, 20), segments=segments).logits
        assert worst(found, model(ids(4, 20), segments=segments.expand(4, 20)).logits) <= 1e-6


@pytest.mark.parametrize("every", [1, 2])
def test_rescaled_layers_compute_the_same(every: int, tmp_path) -> None:
    theirs = oracles.rwkv(num_hidden_layers=5, rescale_every=every)
    with torch.no_grad():
        theirs.rwkv.blocks[0].pre_ln.weight *= 1000  # a stream beside which the norms' ε is nothing, also when halved
    theirs.save_pretrained(tmp_path)
    ours, x = huggingface.load(tmp_path), torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert worst(theirs(x).logits, ours(x).logits) <= 1e-4
        assert theirs.rwkv.layers_are_rescaled


@pytest.fixture(scope="module")
def model() -> Decoder:
    return oracles.randomised(rwkv.EXAMPLE)


@torch.no_grad()
def test_a_long_document_in_pieces_with_a_state_of_one_size(model: Decoder) -> None:
    x = ids(2, 1500)
    cache, pieces, sizes = model.new_cache(2, 0), [], set()
    for piece in x.split(257, 1):
        pieces.append(model(piece, cache=cache).logits)
        sizes.add(sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.before))
    assert worst(torch.cat(pieces, 1), model(x).logits) <= 1e-4
    assert sizes == {2 * 6 * model.config.dim * 4 * model.config.num_layers}  # six vectors of fp32 a layer and row
    assert cache.lengths.tolist() == [1500, 1500] and model.limit is None


def test_the_gradient_stops_at_the_state_before(model: Decoder) -> None:
    cache = model.new_cache(1, 0)
    model(ids(1, 9), cache=cache)
    model.zero_grad()
    model(ids(1, 7, seed=1), cache=cache).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def greedy(module, prompts: list[list[int]], count: int = 6, chunk: int = 512) -> list[list[int]]:
    produced: list[list[int]] = [[] for _ in prompts]
    for one in Engine(module, config=Engine.Config(chunk=chunk)).steps(
        prompts, [Sampling(max_new_tokens=count, temperature=0)] * len(prompts)
    ):
        produced[one.request].append(one.token)
    return produced


@torch.no_grad()
def test_prompts_longer_than_the_context_and_than_a_chunk(model: Decoder) -> None:
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (90, 3, 33, 32)]
    whole = greedy(model, prompts)
    assert greedy(model, prompts, chunk=32) == whole
    for prompt, tokens in zip(prompts, whole, strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "layers",
    [
        Recurrent.Config(cell=LSTM.Config(), num_layers=2),
        Recurrent.Config(cell=GRU.Config()),
        Sandwich.Config(cell=LSTM.Config(), between=MLP.Config(hidden_dim=20)),
    ],
    ids=["lstm", "gru", "sandwich"],
)
def test_recurrent_models_run_in_the_engine(layers: Config) -> None:
    module = oracles.randomised(RecurrentModel.Config(vocab_size=53, dim=12, layers=layers))
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 16, 1)]
    for prompt, tokens in zip(prompts, greedy(module, prompts, chunk=7), strict=True):
        logits = module(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    cache = module.new_cache(1, 0)
    module(ids(1, 5), cache=cache)
    alternatives, segments = ids(1, 6, seed=1), torch.tensor([[1, 1, 2, 2, 2, 3]])
    seen = module(alternatives, segments=segments, cache=cache).logits[0]
    for number in (1, 2, 3):
        row = torch.cat((ids(1, 5)[0], alternatives[0, segments[0] == number]))
        assert worst(seen[segments[0] == number], module(row[None]).logits[0, 5:]) <= 1e-5


class Counting:
    """A module that counts the tokens that it reads."""

    def __init__(self, module: Decoder) -> None:
        self.module, self.tokens = module, 0

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def hidden(self, given: Tensor, **kwargs) -> Tensor:
        self.tokens += given.numel()
        return self.module.hidden(given, **kwargs)


@torch.no_grad()
def test_scores_with_a_state_share_what_prompts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    module = oracles.randomised(rwkv.EXAMPLE.replace(vocab_size=257))
    lm = LocalModel(module, byte_tokenizer(), "tiny")
    monkeypatch.setattr(local, "MOST", 16)
    shared = "what all of them begin with, longer than the context of the model: "
    prompts = [shared + question for question in ("one?", "two?", "three?", "thrice?", "four?")] + ["another"]
    continuations = [" yes", " no", " so", "", " both", " none"]
    found = lm.score(prompts, continuations)
    for prompt, continuation, score in zip(prompts, continuations, found, strict=True):
        whole = torch.tensor([lm.tokenizer.encode(prompt + continuation)])
        logprobs = module(whole).logits[0, :-1].double().log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        wanted = logprobs[len(lm.tokenizer.encode(prompt)) - 1 :].sum().item()
        assert abs(score - wanted) <= 1e-4
    counting = Counting(module)
    lm.module = counting  # type: ignore[assignment]
    assert lm.score(prompts, continuations) == found
    assert counting.tokens < 2.5 * len(shared) + sum(len(p) for p in prompts) - 5 * len(shared) + 20


def test_the_commands_take_it(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    save(rwkv.EXAMPLE.replace(vocab_size=tokenizer.vocab_size).build(), tmp_path, tokenizer)
    prompt = "longer than the context " * 4
    for command in (
        ["generate", str(tmp_path), prompt, "--max-new-tokens", "4", "--json"],
        ["score", str(tmp_path), prompt, " yes", " no"],
    ):
        assert main(command) == 0
        assert capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("config", [rwkv.EXAMPLE, llama.EXAMPLE], ids=["state", "keys"])
def test_a_cache_goes_back(config: Decoder.Config) -> None:
    module = oracles.randomised(config)
    x, cache = ids(1, 12), module.new_cache(1, 12)
    module(x[:, :4], cache=cache)
    cache.mark()
    module(x[:, 4:9], cache=cache)
    held = cache.rewind(6)
    assert held == (4 if config is rwkv.EXAMPLE else 6) and cache.lengths.tolist() == [held]
    logits = module(x[:, held:], cache=cache).logits
    assert worst(logits, module(x).logits[:, held:]) <= 1e-4
    assert cache.rewind(3) == (0 if config is rwkv.EXAMPLE else 3)


@torch.no_grad()
@pytest.mark.parametrize("config", [rwkv.EXAMPLE, llama.EXAMPLE], ids=["state", "keys"])
def test_a_cache_goes_back_to_where_it_stands(config: Decoder.Config) -> None:
    module = oracles.randomised(config)
    x, cache = ids(2, 12), module.new_cache(2, 12)
    module(x[:, :9], cache=cache)
    assert cache.rewind(9) == 9 and cache.lengths.tolist() == [9, 9]
    cache.select(torch.tensor([1]))
    assert cache.rewind(9) == 9
    assert worst(module(x[1:, 9:], cache=cache).logits, module(x[1:]).logits[:, 9:]) <= 1e-4
    with pytest.raises(AssertionError, match="13 tokens of 12"):
        cache.rewind(13)
    if config is rwkv.EXAMPLE:
        with pytest.raises(AssertionError, match="no mark to go back to: a select forgets them all"):
            cache.rewind(8)
        cache.mark()
        module(x[1:, :3], cache=cache)
        assert cache.rewind(14) == 12


@torch.no_grad()
def test_a_model_in_float64_computes_in_float64() -> None:
    module = oracles.randomised(rwkv.EXAMPLE).double()
    x, cache = ids(2, 60), module.new_cache(2, 0)
    whole, pieces = module(x).logits, [module(piece, cache=cache).logits for piece in x.split([1, 33, 1, 25], 1)]
    assert whole.dtype == torch.float64 and worst(torch.cat(pieces, 1), whole) <= 1e-10
    mixer = module.blocks[0].mixer
    inputs = torch.randn(1, 40, mixer.log_decay.numel(), dtype=torch.float64)
    found = mixer(inputs, Following())[0]
    shifted, _ = Following().shift(inputs)
    r, k, v = (torch.lerp(shifted, inputs, mix) for mix in (mixer.mix_r, mixer.mix_k, mixer.mix_v))
    seen = twin(mixer.log_decay.exp(), mixer.bonus, mixer.k(k), mixer.v(v))
    assert worst(found, mixer.out(mixer.r(r).sigmoid() * seen)) <= 1e-10


def test_the_paper_measures_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """States that quietly kept the text would fail the paper's check."""
    smoke = paper.PAPER.sizes["smoke"]
    config = smoke.replace(contexts=(16, 64), rounds=1)
    assert isinstance(config, paper.Config)
    kept = {name: found["bytes"] for name, found in paper._measured(config).items()}
    assert kept[paper.RWKV][0] == kept[paper.RWKV][1] and kept[paper.TRANSFORMER][1] > 3 * kept[paper.TRANSFORMER][0]
    text, advance = [], Cache.advance

    def hoard(self: Cache, counts: int) -> None:
        text.append(torch.zeros(counts))
        advance(self, counts)

    monkeypatch.setattr(Cache, "advance", hoard)
    low, high = paper._measured(config)[paper.RWKV]["bytes"]
    assert high - low == 48 * 4


def test_the_authors_initialisation() -> None:
    torch.manual_seed(0)
    module = rwkv.architecture(vocab_size=400, context=16, dim=64, num_layers=4).build()
    for layer, i in ((0, 0), (0, 63), (1, 17), (3, 40)):
        mixer, channel = module.blocks[layer].mixer, module.blocks[layer].channel
        assert mixer.log_decay[i].item() == pytest.approx(-5 + 8 * (i / 63) ** (0.7 + 1.3 * layer / 3), abs=1e-5)
        assert mixer.bonus[i].item() == pytest.approx(math.log(0.3) + (-0.5, 0.0, 0.5)[(i + 1) % 3], abs=1e-6)
        assert mixer.mix_k[i].item() == pytest.approx((i / 64) ** (1 - layer / 4), abs=1e-6)
        assert mixer.mix_v[i].item() == pytest.approx((i / 64) ** (1 - layer / 4) + 0.3 * layer / 3, abs=1e-6)
        assert mixer.mix_r[i].item() == pytest.approx((i / 64) ** (0.5 * (1 - layer / 4)), abs=1e-6)
        assert (
            channel.mix_k[i].item() == channel.mix_r[i].item() == pytest.approx((i / 64) ** (1 - layer / 4), abs=1e-6)
        )
        for zero in (mixer.r, mixer.k, mixer.out, channel.r, channel.out):
            assert not zero.weight.any()
        assert worst(mixer.v.weight @ mixer.v.weight.T, torch.eye(64)) <= 1e-5
        assert worst(channel.k.weight.T @ channel.k.weight, 4 * torch.eye(64)) <= 1e-5
    assert module.embedding.weight.abs().max() <= 1e-4
    assert worst(module.head.weight.T @ module.head.weight, 0.25 * 400 / 64 * torch.eye(64)) <= 1e-4


def test_it_learns_and_nothing_stands_still() -> None:
    torch.manual_seed(0)
    module = rwkv.architecture(vocab_size=5, context=16, dim=16, num_layers=2).build()
    begun = {name: p.detach().clone() for name, p in module.named_parameters()}
    batches = Windows(torch.arange(400) % 5, batch_size=16, length=16, seed=0)
    training = Training(steps=60, log_every=1).override("optimizer.lr=0.01", "schedule.warmup=0")
    done = train(module, next_token, batches, training, quiet=True)
    assert done.history[-1]["loss"] < 0.1 * done.history[0]["loss"]
    assert all(not torch.equal(begun[name], p) for name, p in module.named_parameters())
