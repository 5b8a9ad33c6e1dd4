"""Random models: those of `transformers`, small and of odd sizes, as oracles; and ours."""

from __future__ import annotations

import torch
import transformers

from allyouneed.core.config import Config

EVEN = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(**changes: object) -> transformers.PreTrainedModel:
    sizes = {
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    }
    return _random(transformers.GPT2LMHeadModel, transformers.GPT2Config(**(EVEN | sizes | changes)))


def gpt(**changes: object) -> transformers.PreTrainedModel:
    sizes = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return _random(transformers.OpenAIGPTLMHeadModel, transformers.OpenAIGPTConfig(**(EVEN | sizes | still | changes)))


def llama(**changes: object) -> transformers.PreTrainedModel:
    """Grouped heads, an untied head, odd sizes."""
    sizes = {
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return _random(transformers.LlamaForCausalLM, transformers.LlamaConfig(**(EVEN | sizes | changes)))


def mixtral(**changes: object) -> transformers.PreTrainedModel:
    """Grouped heads, five experts; PyTorch's grouped product, by which they compute, wants sizes divisible by four."""
    sizes = {
        "hidden_size": 60,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return _random(transformers.MixtralForCausalLM, transformers.MixtralConfig(**(EVEN | sizes | changes)))


def bloom(**changes: object) -> transformers.PreTrainedModel:
    """A head count that is no power of two."""
    sizes = {"hidden_size": 48, "n_layer": 3, "n_head": 6}
    return _random(transformers.BloomForCausalLM, transformers.BloomConfig(**(EVEN | sizes | changes)))


def gpt_neo(**changes: object) -> transformers.PreTrainedModel:
    sizes = {
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "max_position_embeddings": 64,
    }
    return _random(transformers.GPTNeoForCausalLM, transformers.GPTNeoConfig(**(EVEN | sizes | changes)))


def gpt_neox(**changes: object) -> transformers.PreTrainedModel:
    """Three heads of 16, of which 4 are turned; an odd hidden size."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 77,
        "max_position_embeddings": 64,
    }
    return _random(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**(EVEN | sizes | changes)))


def rwkv(**changes: object) -> transformers.PreTrainedModel:
    """Decays and bonuses over the range of the published ones; a hidden size of its own."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 77, "context_length": 64}
    model = _random(transformers.RwkvForCausalLM, transformers.RwkvConfig(**(EVEN | sizes | changes)))
    with torch.no_grad():
        for block in model.rwkv.blocks:
            block.attention.time_decay.uniform_(-5, 3)
            block.attention.time_first.normal_(-1.2, 1.0)
    return model


def t5(**changes: object) -> transformers.PreTrainedModel:
    """Stacks of unequal height, heads that do not divide the width, few buckets that reach not far."""
    sizes = {
        "d_model": 48,
        "d_kv": 10,
        "d_ff": 77,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 5,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
    }
    model = _random(transformers.T5ForConditionalGeneration, transformers.T5Config(**(EVEN | sizes | changes)))
    with torch.no_grad():
        model.shared.weight *= 5  # T5's embeddings are large, its head divides by √dim
    return model


def t5_1_1() -> transformers.PreTrainedModel:
    """Gated GELU, and a head that is not the embedding, which the class itself cannot be told."""
    model = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.shared.weight))
    return model


def switch(**changes: object) -> transformers.PreTrainedModel:
    """Stacks of unequal height, every other block of the one and every third of the other sparse."""
    sizes = {
        "d_model": 48,
        "d_kv": 10,
        "d_ff": 77,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 3,
        "num_sparse_decoder_layers": 1,
        "num_heads": 5,
        "num_experts": 4,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.SwitchTransformersConfig(**(EVEN | sizes | changes))
    model = _random(transformers.SwitchTransformersForConditionalGeneration, config)
    with torch.no_grad():
        model.shared.weight *= 5  # as of T5
    return model


def marian(**changes: object) -> transformers.PreTrainedModel:
    """Stacks of unequal height, width and heads."""
    sizes = {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 77,
        "decoder_ffn_dim": 65,
        "activation_function": "swish",
        "scale_embedding": True,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }
    model = _random(transformers.MarianMTModel, transformers.MarianConfig(**(EVEN | sizes | changes)))
    model.final_logits_bias.normal_(0.0, 0.5)
    return model


BERT = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 77,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
}


def bert(**changes: object) -> transformers.PreTrainedModel:
    """With the heads of pre-training."""
    return _random(transformers.BertForPreTraining, transformers.BertConfig(**(BERT | changes)))


def bert_encoder(**changes: object) -> transformers.PreTrainedModel:
    """The bare encoder with its pooler."""
    return _random(transformers.BertModel, transformers.BertConfig(**(BERT | changes)))


ALL = {
    "gpt": gpt,
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "bloom": bloom,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "rwkv": rwkv,
}

TRANSLATORS = {"t5": t5, "t5 1.1": t5_1_1, "switch": switch, "marian": marian}


def on_disk(model_type: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters, or their gradients, under the names that transformers gives them in its files."""
    if model_type == "gpt_neox":
        return {{"lm_head.weight": "embed_out.weight"}.get(name, name): tensor for name, tensor in tensors.items()}
    if model_type != "mixtral":
        return tensors
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.replace(".mlp.", ".block_sparse_moe.").partition(".experts.")
        for e, of_expert in enumerate(tensor if part else ()):
            halves = (
                zip(("w1", "w3"), of_expert.chunk(2), strict=True) if part == "gate_up_proj" else [("w2", of_expert)]
            )
            found |= {f"{layer}.experts.{e}.{matrix}.weight": half for matrix, half in halves}
        if not part:
            found[layer] = tensor
    return found


def randomised(config: Config) -> torch.nn.Module:
    """A model of ours with every parameter random, so that none can hide."""
    torch.manual_seed(0)
    module = config.build().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return module


def _random(cls: type, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Every parameter random and large enough to matter, norms and biases included."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # sines and cosines
            norm = "norm" in name.lower() or "ln_" in name
            parameter.normal_(1.0 if norm and name.endswith("weight") else 0.0, 0.2 if norm else 0.1)
    return model


def headed(name: str) -> transformers.PreTrainedModel:
    """The class of `transformers` of that name: a head, with three labels for classes, over one of the models above."""
    config = next(make for kind, make in _BASES.items() if name.startswith(kind))().config
    config.num_labels = 3 if name.endswith("Classification") else 2
    return _random(getattr(transformers, name), config)


_BASES = {"GPT2": gpt2, "Llama": llama, "GPTNeoX": gpt_neox, "Bloom": bloom, "Bert": bert_encoder}
