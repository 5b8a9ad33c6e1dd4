"""What we save is what vLLM loads: names, shapes and fields, held against what its own code took (`vllm_run.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import oracles
import pytest
import torch
import transformers
from safetensors import safe_open

import allyouneed as ayn
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models.checkpoints import huggingface

GOLDEN = Path(__file__).parent / "golden" / "vllm.json"
BASES = {
    "GPT2LMHeadModel": oracles.gpt2,
    "LlamaForCausalLM": oracles.llama,
    "MixtralForCausalLM": oracles.mixtral,
    "BloomForCausalLM": oracles.bloom,
    "GPTNeoXForCausalLM": oracles.gpt_neox,
    "BertModel": oracles.bert_encoder,
    "OpenAIGPTLMHeadModel": oracles.gpt,
    "GPTNeoForCausalLM": oracles.gpt_neo,
    "RwkvForCausalLM": oracles.rwkv,
    "BertForPreTraining": oracles.bert,
    "T5ForConditionalGeneration": oracles.t5,
    "SwitchTransformersForConditionalGeneration": oracles.switch,
    "MarianMTModel": oracles.marian,
}
HEADS = [
    family.architecture
    for families in huggingface.HEADED.values()
    for family in families
    if family.architecture.startswith(tuple(oracles._BASES)) and not family.architecture.startswith("GPTNeoFor")
]
CANDIDATES = [*BASES, *HEADS]


def written_by_transformers(architecture: str, folder: Path) -> None:
    model = BASES[architecture]() if architecture in BASES else oracles.headed(architecture)
    model.save_pretrained(folder)


def written_by_us(theirs: Path, folder: Path) -> None:
    ayn.save(ayn.load_module(theirs), folder, byte_tokenizer())


def held(path: Path) -> dict[str, list[int]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


TAKEN = json.loads(GOLDEN.read_text())
VERSION = TAKEN.pop("vllm")
# what is of training, of the writer, or of the tokenizer: vLLM's models read none of it
NOT_READ = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
}


@pytest.fixture(scope="module", params=TAKEN)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """An architecture; a checkpoint of it by transformers; and what we make of that."""
    theirs, ours = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
    written_by_transformers(request.param, theirs)
    written_by_us(theirs, ours)
    return request.param, theirs, ours


def test_every_tensor_that_the_loader_wants_is_there_and_no_other(folders: tuple[str, Path, Path]) -> None:
    architecture, _, ours = folders
    assert held(ours / "model.safetensors") == TAKEN[architecture]


def test_tensors_hold_the_same_numbers(folders: tuple[str, Path, Path]) -> None:
    _, theirs, ours = folders
    with safe_open(theirs / "model.safetensors", "pt") as one, safe_open(ours / "model.safetensors", "pt") as other:
        assert all(
            torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in held(theirs / "model.safetensors")
        )


def test_config_names_the_class_and_says_what_transformers_says(folders: tuple[str, Path, Path]) -> None:
    architecture, theirs, ours = folders
    told = json.loads((ours / "config.json").read_text())
    assert told["architectures"] == [architecture] and told["dtype"] == "float32"
    one, other = (transformers.AutoConfig.from_pretrained(folder) for folder in (theirs, ours))
    assert type(one) is type(other) and one.model_type == told["model_type"]
    said = {name: value for name, value in one.to_dict().items() if name not in NOT_READ and value is not None}
    assert said == {name: value for name, value in other.to_dict().items() if name in said}
    if architecture in BASES:  # over a head for labels there is nothing to tie
        assert one.tie_word_embeddings == other.tie_word_embeddings


def test_shards_are_found_by_their_index(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    """vLLM reads the files that the index names, and leaves out any other."""
    architecture, theirs, _ = folders
    ayn.save(ayn.load_module(theirs), tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and sorted(set(index.values())) == files
    found = {name: shape for file in files for name, shape in held(tmp_path / file).items()}
    assert found == TAKEN[architecture]
    assert all(name in held(tmp_path / file) for name, file in index.items())


def test_the_tokenizer_is_read_with_its_template_and_its_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    ayn.save(oracles.randomised(huggingface.FAMILIES["llama"][0].example), tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "user", "content": "Grüß 🙂"}]
    assert theirs.apply_chat_template(asked, tokenize=False) == "<user>Grüß 🙂"
    assert theirs("Grüß 🙂")["input_ids"] == tokenizer.encode("Grüß 🙂")
    assert {theirs.eos_token_id} == set(tokenizer.eos_ids)


def test_the_page_names_what_is_taken_and_what_is_not() -> None:
    page = (Path(__file__).parents[1] / "docs" / "fleet.md").read_text()
    served, _, refused = page.partition("## Serving with vLLM")[2].partition("Not served")
    assert VERSION in served
    for architecture in CANDIDATES:
        assert (f"`{architecture}`" in served, f"`{architecture}`" in refused) == (
            architecture in TAKEN,
            architecture not in TAKEN,
        ), architecture
