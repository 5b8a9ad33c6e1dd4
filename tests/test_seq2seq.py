"""Encoder and decoder: T5 and Marian against `transformers`, and what every registered family of them must do."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
import transformers

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.generate.beams import beam_search, power
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.models import marian, t5
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.loading import load_decoder, load_module, save
from allyouneed.models.encoder_decoder import Answering, EncoderDecoder
from allyouneed.nn.positions import RelativeBias, RelativeBiasBothWays

TOLERANCE = 1e-4
START, END = 1, 2  # Marian does not train the embedding of padding, 0, so nothing starts from it
VARIANTS = {
    **{name: (make, {}) for name, make in oracles.TRANSLATORS.items()},
    "t5 gated silu, 32 buckets": (
        oracles.t5,
        {
            "feed_forward_proj": "gated-silu",
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
        },
    ),
    "t5 gated gelu, tied, not scaled": (
        oracles.t5,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "switch, all blocks sparse": (oracles.switch, {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3}),
    "switch, five places at an expert": (oracles.switch, {"expert_capacity": 5}),
    "marian relu, embeddings as they are": (
        oracles.marian,
        {"activation_function": "relu", "scale_embedding": False},
    ),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request, tmp_path_factory):
    """A random model of theirs, and ours read from the folder that it was saved to."""
    make, changes = VARIANTS[request.param]
    theirs = make(**changes)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, huggingface.load(folder)


def ids(rows: int, length: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance


@torch.no_grad()
def test_logits(pair):
    theirs, ours = pair
    source, target = ids(2, 41), ids(2, 30, seed=1)
    expected = theirs(source, decoder_input_ids=target).logits
    assert expected.std() > 0.1  # else equality would say nothing
    close(ours(source, target).logits, expected)


@torch.no_grad()
def test_logits_of_padded_sources_and_targets(pair):
    theirs, ours = pair
    source, target = ids(3, 12), ids(3, 9, seed=1)
    segments, target_segments = torch.ones_like(source), torch.ones_like(target)
    segments[1, 7:] = segments[2, 1:] = target_segments[0, 4:] = 0
    expected = theirs(
        source, attention_mask=segments, decoder_input_ids=target, decoder_attention_mask=target_segments
    ).logits
    found = ours(source, target, source_segments=segments, segments=target_segments).logits
    close(found[target_segments == 1], expected[target_segments == 1])


def test_gradients_of_one_step(pair):
    theirs, ours = pair
    source, target = ids(2, 24), ids(2, 17, seed=1)
    start = torch.full((2, 1), START)
    their_loss = theirs(source, labels=target).loss
    theirs.zero_grad()
    their_loss.backward()
    ours.zero_grad()
    logits = ours(source, torch.cat((start, target[:, :-1]), 1)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    assert abs(their_loss.item() - loss.item()) <= TOLERANCE
    (family,) = huggingface.FAMILIES[theirs.config.model_type]
    rules = family.rules(ours.config)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    mapped = huggingface.to_theirs(rules, ours.config.layers, gradients)
    mapped.pop("final_logits_bias", None)  # which they do not train
    expected = {  # an expert that no token came to has no gradient there, and here zeros
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert set(mapped) == set(expected)
    for name, gradient in mapped.items():
        close(gradient, expected[name])
    ours.zero_grad()


@torch.no_grad()
def test_their_loader_reads_what_we_save(pair, tmp_path):
    theirs, ours = pair
    huggingface.save(ours, tmp_path, max_shard_bytes=60_000)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(theirs)
    source, target = ids(2, 20), ids(2, 11, seed=1)
    close(again(source, decoder_input_ids=target).logits, ours(source, target).logits)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def ended(tokens: list[int]) -> list[int]:
    """Up to the end token; what `transformers` fills rows with after it counts for nothing."""
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def test_greedy_answers_equal_theirs(pair):
    theirs, ours = pair
    source = ids(3, 9)
    segments = torch.ones_like(source)
    segments[0, 5:] = segments[2, 2:] = 0
    out = theirs.generate(
        source, attention_mask=segments, max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=0
    )
    produced: list[list[int]] = [[], [], []]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    memory = ours.remember(source, segments)
    for step in Engine(Answering(ours), [END]).steps([[START]] * 3, [greedy] * 3, memory=memory):
        produced[step.request].append(step.token)
    for sequence, tokens in zip(out[:, 1:].tolist(), produced, strict=True):
        assert ended(sequence) == tokens


@pytest.mark.parametrize("seed", range(3))
def test_beams_equal_theirs(pair, seed):
    theirs, ours = pair
    source = ids(1, 8, seed=seed)
    out = theirs.generate(
        source,
        max_new_tokens=10,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=END,
        pad_token_id=0,
    )
    hypotheses = beam_search(
        Engine(Answering(ours), [END]),
        [START],
        beams=4,
        max_new_tokens=10,
        penalty=power(1.0),
        memory=ours.remember(source),
    )
    for hypothesis, sequence, score in zip(hypotheses, out.sequences, out.sequences_scores.tolist(), strict=True):
        assert list(hypothesis.tokens) == ended(sequence[1:].tolist())
        assert abs(hypothesis.score - score) <= TOLERANCE


def test_buckets_equal_theirs():
    distance = torch.arange(-300, 301)
    for num_buckets, max_distance in ((32, 128), (12, 20), (8, 12)):
        for part, both_ways in ((RelativeBias, False), (RelativeBiasBothWays, True)):
            ours = part.Config(num_buckets=num_buckets, max_distance=max_distance).build(
                dim=8, num_heads=2, head_dim=4, context=16
            )
            expected = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
                -distance, both_ways, num_buckets, max_distance
            )
            assert torch.equal(ours.buckets(distance), expected)


def test_old_names_of_the_same_tensors(tmp_path):
    """Checkpoints from before safetensors hold shared tensors again, and tables that the model computes."""
    from safetensors.torch import load_file, save_file

    for make, again, computed in (
        (
            oracles.t5,
            "encoder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        ),
        (oracles.marian, "model.decoder.embed_tokens.weight", "model.encoder.embed_positions.weight"),
    ):
        folder = tmp_path / make.__name__
        make().save_pretrained(folder)
        plain = huggingface.load(folder)
        tensors = load_file(folder / "model.safetensors")
        shared = tensors["shared.weight" if make is oracles.t5 else "model.shared.weight"]
        held = tensors | {again: shared.clone(), computed: torch.zeros(3, 3)}
        save_file(held, folder / "model.safetensors")
        for name, parameter in huggingface.load(folder).named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name)), name
        save_file(held | {again: shared + 1}, folder / "model.safetensors")
        with pytest.raises(
            InputError, match=r"shared\.weight' .* and '.*embed_tokens\.weight' .* differ, but this model has one"
        ):
            huggingface.load(folder)


# What every registered family must do

FAMILIES = {
    name: family.example
    for name, families in huggingface.FAMILIES.items()
    for family in families
    if isinstance(family.example, EncoderDecoder.Config)
}
CONFIGS = {
    **FAMILIES,
    "t5 1.1": t5.architecture(
        vocab_size=53,
        context=48,
        dim=20,
        num_layers=2,
        num_heads=3,
        head_dim=6,
        hidden_dim=33,
        activation="gelu_tanh",
        gated=True,
        tied=False,
        scaled=False,
    ),
    "2017": marian.architecture(
        vocab_size=53, context=48, dim=24, num_layers=2, num_heads=4, hidden_dim=33, bias=False, head_bias=False
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> EncoderDecoder:
    return oracles.randomised(CONFIGS[request.param])


def small(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return ids(rows, length, seed, vocab_size=53)


def test_forward_and_backward(model):
    source, target = small(2, 11), small(2, 9, seed=1)
    logits = model(source, target).logits
    assert logits.shape == (2, 9, 53) and logits.isfinite().all()
    model.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k.bias"), name
    model.zero_grad()


@torch.no_grad()
def test_targets_see_no_later_target_and_all_of_the_source(model):
    source, target = small(1, 11), small(1, 12, seed=1)
    logits = model(source, target).logits
    changed = target.clone()
    changed[:, 7:] = small(1, 5, seed=2)
    again = model(source, changed).logits
    close(logits[:, :7], again[:, :7], 1e-6)
    assert (logits[:, 7:] - again[:, 7:]).abs().max() > 1e-3
    for place in (0, 10):
        other = source.clone()
        other[:, place] = (source[:, place] + 1) % 53
        assert (model(other, target).logits[:, 0] - logits[:, 0]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(model, side):
    def padded(rows: list[torch.Tensor], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        filled, segments = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            filled[i, place], segments[i, place] = row, 1
        return filled, segments

    sources = [small(1, n, seed=n)[0] for n in (5, 13, 1)]
    targets = [small(1, n, seed=n + 1)[0] for n in (8, 1, 4)]
    (source, seen), (target, segments) = padded(sources, 14), padded(targets, 9)
    logits = model(source, target, source_segments=seen, segments=segments).logits
    assert logits.isfinite().all()
    for i in range(3):
        close(logits[i][segments[i] == 1], model(sources[i][None], targets[i][None]).logits[0])


@torch.no_grad()
def test_other_rows_do_not_matter(model):
    source, target = small(4, 11), small(4, 9, seed=1)
    whole = model(source, target).logits
    for row in range(4):
        close(whole[row : row + 1], model(source[row : row + 1], target[row : row + 1]).logits)


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 9, [4, 5], [1, 7, 1], [9]])
def test_cached_equals_uncached(model, steps):
    source, target = small(3, 11), small(3, 9, seed=1)
    seen = torch.ones_like(source)
    seen[1, 6:] = 0
    whole = model(source, target, source_segments=seen).logits
    answering = Answering(model)
    cache = answering.new_cache(3, 9, model.remember(source, seen))
    pieces = []
    for piece in target.split(steps, 1):
        pieces.append(answering.head(answering.hidden(piece, cache=cache)))
    close(torch.cat(pieces, 1), whole)


@torch.no_grad()
def test_rows_that_leave_take_their_sources_along(model):
    source, target = small(3, 11), small(3, 6, seed=1)
    answering = Answering(model)
    cache = answering.new_cache(3, 6, model.remember(source))
    answering.hidden(target[:, :5], cache=cache)
    kept = torch.tensor([2, 0, 2])
    cache.select(kept)
    close(
        answering.head(answering.hidden(target[kept, 5:], cache=cache))[:, 0],
        model(source[kept], target[kept]).logits[:, -1],
    )


@torch.no_grad()
def test_bfloat16(model):
    source, target = small(1, 10), small(1, 8, seed=1)
    half = model.config.build().bfloat16().eval()
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    logits = half(source, target).logits
    assert logits.dtype == torch.bfloat16
    exact = model(source, target).logits
    assert (logits.float() - exact).abs().mean() <= 0.05 * exact.std()


@torch.no_grad()
def test_saved_and_loaded(model, tmp_path):
    save(model, tmp_path)
    again = load_module(tmp_path)
    source, target = small(2, 12), small(2, 9, seed=1)
    close(again(source, target).logits, model(source, target).logits, 0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not again.training
    with pytest.raises(InputError, match="a decoder is wanted"):
        load_decoder(tmp_path)


@torch.no_grad()
def test_what_no_family_has_is_saved_as_our_own(tmp_path):
    mixed = CONFIGS["t5"].replace(encoder=marian.EXAMPLE.encoder.replace(dim=20, num_layers=1))
    module = mixed.build().eval()
    save(module, tmp_path)
    assert '"model_type": "allyouneed"' in (tmp_path / "config.json").read_text()
    source, target = small(2, 12), small(2, 9, seed=1)
    close(load_module(tmp_path)(source, target).logits, module(source, target).logits, 0.0)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"num_layers": 3', '"num_layers": 4'))
    with pytest.raises(InputError, match="num_layers=4, but the weights hold 3"):
        load_module(tmp_path)


def test_config_survives_json(model):
    assert Config.from_json(model.config.to_json()) == model.config


def test_parameters_counted_on_meta(model):
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_dropout_falls_where_the_paper_says():
    """Sec. 2.1: within the feed-forward network, on the skip connection, the attention weights, and at the input and
    output of the stack."""
    config = t5.architecture(vocab_size=53, dim=64, num_layers=1, num_heads=2, head_dim=8, hidden_dim=32, dropout=0.5)
    model = config.build().train()
    source = small(4, 12)
    dropped = (model.remember(source).states == 0).float().mean().item()
    assert 0.4 < dropped < 0.6
    block = model.encoder.blocks[0]
    assert (block.dropout, block.mixer.dropout, block.channel.dropout, config.encoder.dropout) == (0.5,) * 4
    seen: list[torch.Tensor] = []
    block.channel.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.remember(source)
    assert (seen[0] == 0).float().mean() > 0.6  # half by ReLU, half of the rest by dropout


def test_weights_begin_as_the_authors_have_it():
    torch.manual_seed(0)
    config = t5.architecture(vocab_size=999, dim=256, num_layers=2, num_heads=4, head_dim=16, hidden_dim=512)
    model = config.build()
    block = model.decoder.blocks[1]
    for weight, std in (
        (model.encoder.embedding.weight, 1.0),
        (block.mixer.q.weight, (256 * 16) ** -0.5),
        (block.cross.k.weight, 256**-0.5),
        (block.mixer.out.weight, 64**-0.5),
        (block.channel.out.weight, 512**-0.5),
        (model.decoder.positions.embedding.weight, 256**-0.5),
    ):
        assert abs(weight.std().item() / std - 1) < 0.15
