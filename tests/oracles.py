"""Random models of `transformers`, small and of odd sizes, as oracles."""

from __future__ import annotations

import torch
import transformers

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


ALL = {"gpt": gpt, "gpt2": gpt2, "llama": llama, "bloom": bloom, "gpt_neo": gpt_neo, "gpt_neox": gpt_neox}

# parameters that transformers calls otherwise in its files than in memory
ON_DISK = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}


def _random(cls: type, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Every parameter random and large enough to matter, norms and biases included."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "ln_" in name
            parameter.normal_(1.0 if norm and name.endswith("weight") else 0.0, 0.2 if norm else 0.1)
    return model
