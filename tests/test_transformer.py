"""The Transformer of 2017 against `torch.nn.Transformer` with the same weights, and its own contracts."""

from __future__ import annotations

import pytest
import torch

from allyouneed.core.config import Config
from allyouneed.core.seeds import seed_everything
from allyouneed.generate.beams import beam_search, gnmt
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.models import transformer
from allyouneed.models.encoder_decoder import Answering, EncoderDecoder, cross_weights

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> EncoderDecoder:
    seed_everything(0)
    module = transformer.architecture(vocab_size=29, context=32, dim=24, num_layers=2, num_heads=3, hidden_dim=40)
    built = module.build().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.3)
    return built


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 29, (rows, length), generator=torch.Generator().manual_seed(seed))


def theirs_of(ours: EncoderDecoder) -> torch.nn.Transformer:
    """`torch.nn.Transformer` with our weights; it has no embeddings, and a last norm that is taken away here."""
    theirs = torch.nn.Transformer(24, 3, 2, 2, 40, dropout=0.0, batch_first=True).eval()
    theirs.encoder.norm = theirs.decoder.norm = None
    with torch.no_grad():
        for mine, other in [(ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)]:
            for block, layer in zip(mine.blocks, other.layers, strict=True):
                pairs = [
                    (block.mixer, layer.self_attn),
                    (getattr(block, "cross", None), getattr(layer, "multihead_attn", None)),
                ]
                for attention, other_attention in pairs:
                    if attention is not None:
                        other_attention.in_proj_weight.copy_(
                            torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
                        )
                        other_attention.in_proj_bias.zero_()
                        other_attention.out_proj.weight.copy_(attention.out.weight)
                        other_attention.out_proj.bias.zero_()
                norms = [block.mixer_norm, *([block.cross_norm] if hasattr(block, "cross") else []), block.channel_norm]
                for number, norm in enumerate(norms, 1):
                    getattr(layer, f"norm{number}").load_state_dict(norm.state_dict())
                layer.linear1.load_state_dict(block.channel.up.state_dict())
                layer.linear2.load_state_dict(block.channel.out.state_dict())
    return theirs


def test_equals_torchs_transformer(model):
    theirs, source, target = theirs_of(model), ids(2, 9), ids(2, 7, seed=1)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 6:] = 0

    def embedded(tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1])[None]
        return model.encoder.positions.embed(model.encoder.embedding(tokens) * 24**0.5, places)

    triangle = torch.nn.Transformer.generate_square_subsequent_mask(7)
    with torch.no_grad():
        expected = theirs(
            embedded(source),
            embedded(target),
            tgt_mask=triangle,
            src_key_padding_mask=padding == 0,
            memory_key_padding_mask=padding == 0,
        )
        expected = expected @ model.head.weight.T
        found = model(source, target, padding).logits
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_gradients_equal_torchs(model):
    theirs, source, target = theirs_of(model), ids(2, 9), ids(2, 7, seed=1)
    model.zero_grad()
    model(source, target).logits.square().mean().backward()
    embed = model.encoder.positions.embed
    x = embed(model.encoder.embedding(source) * 24**0.5, torch.arange(9)[None]).detach()
    y = embed(model.encoder.embedding(target) * 24**0.5, torch.arange(7)[None]).detach()
    triangle = torch.nn.Transformer.generate_square_subsequent_mask(7)
    (theirs(x, y, tgt_mask=triangle) @ model.head.weight.detach().T).square().mean().backward()
    for ours, other in [
        (model.encoder.blocks[0], theirs.encoder.layers[0]),
        (model.decoder.blocks[1], theirs.decoder.layers[1]),
    ]:
        expected = other.self_attn.in_proj_weight.grad
        found = torch.cat([ours.mixer.q.weight.grad, ours.mixer.k.weight.grad, ours.mixer.v.weight.grad])
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.allclose(ours.channel.up.weight.grad, other.linear1.weight.grad, rtol=1e-3, atol=1e-6)


@torch.inference_mode()
def test_no_later_target_token_is_seen(model):
    source, target = ids(1, 5), ids(1, 8, seed=1)
    changed = target.clone()
    changed[0, 5] = (target[0, 5] - 2) % 26 + 3
    a, b = model(source, target).logits, model(source, changed).logits
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-3


@torch.inference_mode()
def test_every_source_token_is_seen_by_every_target_token(model):
    source, target = ids(1, 6), ids(1, 4, seed=1)
    for place in (0, 5):
        changed = source.clone()
        changed[0, place] = (source[0, place] - 2) % 26 + 3
        moved = (model(source, target).logits - model(changed, target).logits).abs().amax(-1)[0]
        assert (moved > 1e-4).all()


@torch.inference_mode()
def test_padding_does_not_matter(model):
    short, long, target = ids(1, 4, seed=2), ids(1, 7, seed=3), ids(2, 6, seed=1)
    source = torch.zeros(2, 7, dtype=torch.long)
    source[0, :4], source[1] = short, long
    segments = torch.ones(2, 6, dtype=torch.long)
    segments[0, 4:] = 0
    together = model(source, target, (source != 0).long(), segments).logits
    torch.testing.assert_close(together[0, :4], model(short, target[:1, :4]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], model(long, target[1:]).logits[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_generation_is_argmax_of_the_forward_pass(model):
    source, sampling = ids(3, 6), Sampling(max_new_tokens=9, temperature=0)
    written = [[1], [1], [1]]
    for step in Engine(Answering(model)).steps([[1]] * 3, [sampling] * 3, memory=model.remember(source)):
        written[step.request].append(step.token)
    logits = model(source, torch.tensor(written)[:, :-1]).logits
    assert logits.argmax(-1).tolist() == [row[1:] for row in written]


@torch.inference_mode()
def test_beams_score_what_the_forward_pass_scores(model):
    source = ids(1, 6)
    engine = Engine(Answering(model), eos_ids=[2])
    memory = model.remember(source)
    found = beam_search(engine, [1], beams=4, max_new_tokens=8, penalty=gnmt(0.6), memory=memory)
    for hypothesis in found:
        tokens = torch.tensor([[1, *hypothesis.tokens]])
        logprobs = model(source, tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
        assert abs(logprobs.sum().item() - hypothesis.logprob) < 1e-4
        assert hypothesis.score == pytest.approx(hypothesis.logprob / ((5 + len(hypothesis.tokens)) / 6) ** 0.6)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_where_the_writer_looks_does_not_depend_on_the_other_rows(model):
    source, target = ids(2, 6), ids(2, 5, seed=1)
    weights = cross_weights(model, source, target)
    assert weights.shape == (2, 5, 6) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(cross_weights(model, source[:1], target[:1])[0], weights[0])
    torch.testing.assert_close(cross_weights(model, source, target[:, :3]), weights[:, :3])


def test_config_survives_json_and_embeddings_are_one(model):
    assert Config.from_json(model.config.to_json()) == model.config
    assert model.decoder.embedding.weight is model.encoder.embedding.weight is model.head.weight
