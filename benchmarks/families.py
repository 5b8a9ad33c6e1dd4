"""Each family's peer and ours with the same weights, and one batch for both: what `training.py` measures.

Some 2 M parameters each: 2048 tokens, 160 wide, five heads, no dropout. Peers attend by SDPA where they can.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from allyouneed.data.masked import Masking, mask
from allyouneed.models import marian
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.names import Rule, both, same, thirds, to_theirs
from allyouneed.nn.positions import Sinusoidal
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.masked import masked_and_pairs
from allyouneed.objectives.next_token import IGNORED, next_token
from allyouneed.objectives.span import target_given_source

VOCAB, DIM, HIDDEN, HEADS, CONTEXT = 2048, 160, 640, 5, 512
BATCH, LENGTH = 8, 128

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """Two modules with the same weights, and the loss of the same `batch` by each side's own means."""

    theirs: nn.Module
    ours: nn.Module
    batch: Batch
    their_loss: Callable[[nn.Module, Batch], Tensor]
    objective: Callable[[Any, Batch], Loss]

    def losses(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return (
            lambda: self.their_loss(self.theirs, self.batch),
            lambda: self.objective(self.ours, self.batch).mean,
        )


def shaken(model: nn.Module) -> nn.Module:
    """`model` with something added to every parameter, so that equal losses mean equal computations."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's sines are parameters, but not to be learned
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def read_by_us(theirs: transformers.PreTrainedModel) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return huggingface.load(Path(folder))


def ids(vocab_size: int = VOCAB, batch: int = BATCH) -> Tensor:
    return torch.randint(3, vocab_size, (batch, LENGTH))


# Decoders: they shift the labels themselves, so that the last place has no target.


def decoder(name: str, sizes: Mapping[str, Any], *, attention: str = "sdpa", batch: int = BATCH) -> Pair:
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": VOCAB, "use_cache": False, **sizes}, attn_implementation=attention
    )
    classes = {"OpenAIGPT": transformers.OpenAIGPTLMHeadModel, "GPT2": transformers.GPT2LMHeadModel}
    model = shaken(classes.get(name, getattr(transformers, f"{name}ForCausalLM", None))(config))
    rows = ids(config.vocab_size, batch)
    targets = torch.cat((rows[:, 1:], torch.full((batch, 1), IGNORED)), 1)
    return Pair(
        model,
        read_by_us(model),
        {"ids": rows, "targets": targets},
        lambda module, batch: module(batch["ids"], labels=batch["ids"]).loss,
        next_token,
    )


GPT = {"n_embd": DIM, "n_layer": 5, "n_head": HEADS, "n_positions": CONTEXT}
GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BLOOM = {"hidden_size": DIM, "n_layer": 5, "n_head": HEADS}
GPT_NEO = {
    "hidden_size": DIM,
    "num_layers": 6,
    "num_heads": HEADS,
    "attention_types": [[["global", "local"], 3]],
    "window_size": LENGTH // 4,
    "max_position_embeddings": CONTEXT,
}
GPT_NEOX = {
    "hidden_size": DIM,
    "num_hidden_layers": 5,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": CONTEXT,
}
RWKV = {"hidden_size": DIM, "num_hidden_layers": 5, "intermediate_size": HIDDEN, "context_length": CONTEXT}


def llama(dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }


# An encoder: 15 % of the tokens hidden, two sentences a row.


def bert() -> Pair:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model, rows = shaken(transformers.BertForPreTraining(config)), ids()
    every = torch.ones_like(rows, dtype=torch.bool)
    shown, targets = mask(rows, every, torch.Generator().manual_seed(0), mask_id=1, vocab_size=VOCAB, masking=Masking())
    batch = {
        "ids": shown,
        "targets": targets,
        "types": (torch.arange(LENGTH) >= LENGTH // 2).long().expand(BATCH, -1),
        "following": torch.arange(BATCH) % 2,
        "pair_weights": ((targets != IGNORED).sum() / BATCH).expand(BATCH),
    }

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        names = {"labels": "targets", "token_type_ids": "types", "next_sentence_label": "following"}
        return module(batch["ids"], **{theirs: batch[ours] for theirs, ours in names.items()}).loss

    return Pair(model, read_by_us(model), batch, loss, masked_and_pairs)


# Translators: as many tokens of source as of target.


def translated() -> Batch:
    written = torch.randint(3, VOCAB, (BATCH, LENGTH + 1))
    return {"source": ids(), "ids": written[:, :-1], "targets": written[:, 1:].contiguous()}


def translator(model: nn.Module) -> Pair:
    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return module(batch["source"], decoder_input_ids=batch["ids"], labels=batch["targets"]).loss

    return Pair(model, read_by_us(model), translated(), loss, target_given_source)


def t5(**changes: Any) -> nn.Module:
    sizes = {"d_model": DIM, "d_kv": DIM // HEADS, "d_ff": HIDDEN, "num_layers": 2, "num_heads": HEADS}
    config = transformers.T5Config(
        **{"vocab_size": VOCAB, "dropout_rate": 0.0, "use_cache": False, "decoder_start_token_id": 0} | sizes | changes,
        attn_implementation="sdpa",
    )
    return shaken(transformers.T5ForConditionalGeneration(config))


def t5_1_1() -> nn.Module:
    """Gated GELU and a head that is not the embedding, which the class itself cannot be told."""
    model = t5(feed_forward_proj="gated-gelu", d_ff=2 * HIDDEN // 3, tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(0.3 * torch.randn_like(model.shared.weight))
    return model


def marian_mt() -> nn.Module:
    sizes = {"layers": 2, "attention_heads": HEADS, "ffn_dim": HIDDEN}
    stacks = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sizes.items()}
    config = transformers.MarianConfig(
        vocab_size=VOCAB,
        d_model=DIM,
        **stacks,
        activation_function="swish",
        scale_embedding=True,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        attn_implementation="sdpa",
    )
    return shaken(transformers.MarianMTModel(config))


class TorchTransformer(nn.Module):
    """`torch.nn.Transformer` with what it leaves to its users: embedding, sinusoids, head. No norms at the end."""

    places: Tensor
    triangle: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a way to run without gradients that five heads rule out
            self.stacks = nn.Transformer(DIM, HEADS, num_layers, num_layers, HIDDEN, dropout=0.0, batch_first=True)
        self.stacks.encoder.norm = self.stacks.decoder.norm = None
        sinusoids = Sinusoidal.Config().build(dim=DIM, num_heads=HEADS, head_dim=DIM // HEADS, context=CONTEXT)
        self.register_buffer("places", sinusoids.embed(torch.zeros(1, LENGTH, DIM), torch.arange(LENGTH)[None]))
        self.register_buffer("triangle", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def embed(self, tokens: Tensor) -> Tensor:
        return DIM**0.5 * self.embedding(tokens) + self.places

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        source, target = self.embed(source), self.embed(target)
        hidden = self.stacks(source, target, tgt_mask=self.triangle, tgt_is_causal=True)
        return nn.functional.linear(hidden, self.embedding.weight)


def transformer() -> Pair:
    """Ours with biases in attention, because theirs has them."""
    config = marian.architecture(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=2,
        num_heads=HEADS,
        hidden_dim=HIDDEN,
        positions=Sinusoidal.Config(),
        head_bias=False,
    )
    model, theirs = shaken(config.build()), TorchTransformer(2)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mapped = to_theirs(torchs_rules(), config.layers, state)
    assert set(mapped) == {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict(mapped, strict=False)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch["source"], batch["ids"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)

    return Pair(theirs, model, translated(), loss, target_given_source)


def torchs_rules() -> list[Rule]:
    """The names of `nn.Transformer`'s tensors."""
    found = [same("encoder.embedding.weight", "embedding.weight")]
    for stack, sign, branches in (
        ("encoder", "i", {"mixer": "self_attn"}),
        ("decoder", "j", {"mixer": "self_attn", "cross": "multihead_attn"}),
    ):
        ours, theirs = f"{stack}.blocks.{{{sign}}}", f"stacks.{stack}.layers.{{{sign}}}"
        for name, theirs_name in branches.items():
            for kind in ("weight", "bias"):
                parts = (f"{ours}.{name}.{part}.{kind}" for part in "qkv")
                found.append(thirds(parts, f"{theirs}.{theirs_name}.in_proj_{kind}"))
            found += both(f"{ours}.{name}.out", f"{theirs}.{theirs_name}.out_proj")
        for number, name in enumerate((*branches, "channel"), 1):
            found += both(f"{ours}.{name}_norm", f"{theirs}.norm{number}")
        found += both(f"{ours}.channel.up", f"{theirs}.linear1")
        found += both(f"{ours}.channel.out", f"{theirs}.linear2")
    return found


FAMILIES: dict[str, Callable[[], Pair]] = {
    "gpt": lambda: decoder("OpenAIGPT", GPT, attention="eager"),
    "gpt2": lambda: decoder("GPT2", GPT),
    "llama": lambda: decoder("Llama", llama(DIM, 5, HEADS, 432)),
    "llama-20m": lambda: decoder("Llama", {"vocab_size": 8192, **llama(384, 8, 6, 1024)}, batch=4),
    "bloom": lambda: decoder("Bloom", BLOOM, attention="eager"),
    "gpt_neo": lambda: decoder("GPTNeo", GPT_NEO, attention="eager"),
    "gpt_neox": lambda: decoder("GPTNeoX", GPT_NEOX),
    "rwkv": lambda: decoder("Rwkv", RWKV, attention="eager"),
    "bert": bert,
    "t5": lambda: translator(t5()),
    "t5-1.1": lambda: translator(t5_1_1()),
    "marian": lambda: translator(marian_mt()),
    "transformer": transformer,
}
