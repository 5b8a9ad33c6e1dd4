"""Modules whose layers are stored in few bits: in memory, in files that transformers reads and writes, under LoRA; and
the command.
"""

from __future__ import annotations

import json
from pathlib import Path

import oracles
import pytest
import torch
from mutations import mutations, survives
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allyouneed import cli
from allyouneed.adapt.lora import Lora, adapt
from allyouneed.adapt.packing import KINDS, pack
from allyouneed.adapt.quantise import Quantise, dequantise, quantise, resident
from allyouneed.core.errors import InputError
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import gpt2, llama
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.models.decoder import Decoder
from allyouneed.nn.blockwise import blockwise
from allyouneed.nn.codebooks import BOOKS
from allyouneed.nn.packed import PackedEmbedding
from allyouneed.nn.quantised import QuantisedEmbedding, QuantisedLinear

IDS = torch.tensor([[5, 3, 9, 1, 2], [4, 4, 0, 8, 7]])
SMALL = llama.architecture(
    vocab_size=97, context=64, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=128, tied=True
)


def model(config: Decoder.Config = SMALL) -> Decoder:
    torch.manual_seed(0)
    return config.build().eval()


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(IDS).logits


def quantised(kind: str = "nf4", **options) -> Decoder:
    module = model()
    quantise(module, Quantise.Config(kind=kind, **options))
    return module


# in memory


def test_all_linear_layers_but_the_head() -> None:
    module = quantised()
    stored = {name for name, part in module.named_modules() if isinstance(part, QuantisedLinear)}
    linear = {name for name, part in model().named_modules() if isinstance(part, nn.Linear)}
    assert stored == linear - {"head"} and len(stored) == 14
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in model().named_parameters()} - {
        f"{name}.weight" for name in stored
    }


@pytest.mark.parametrize("kind", BOOKS)
def test_logits_are_those_of_the_dequantised_weights(kind: str) -> None:
    module, plain = quantised(kind), model()
    for name, part in module.named_modules():
        if isinstance(part, QuantisedLinear):
            plain.get_submodule(name).weight.data.copy_(part.dequantised())
    assert torch.allclose(logits(module), logits(plain), atol=1e-5)
    assert not torch.allclose(logits(module), logits(model()), atol=1e-4)


def test_an_embedding_and_its_head_share_what_they_are_stored_in() -> None:
    module = quantised(embedding="int8")
    assert isinstance(module.embedding, QuantisedEmbedding) and isinstance(module.head, QuantisedLinear)
    assert module.head.weight is module.embedding.weight and module.head.weight.kind == "int8"
    assert torch.allclose(logits(module), logits(quantised()), atol=0.05)
    untied = model(SMALL.replace(tied=False))
    quantise(untied, Quantise.Config(embedding="int8"))
    assert isinstance(untied.embedding, QuantisedEmbedding) and type(untied.head) is nn.Linear


def test_chosen_layers() -> None:
    module = model()
    assert quantise(module, Quantise.Config(), targets=("q", "v")) == [
        f"blocks.{i}.mixer.{name}" for i in range(2) for name in "qv"
    ]
    with pytest.raises(InputError, match="QuantisedLinear cannot be quantised"):
        quantise(module, Quantise.Config(), targets=("q",))
    with pytest.raises(InputError, match="head shares its tensor with embedding"):
        quantise(model(), Quantise.Config(), targets=("head",))
    with pytest.raises(InputError, match="matches no linear layer"):
        quantise(model(), Quantise.Config(), targets=("qq",))


def test_a_weight_that_is_no_number_is_named() -> None:
    module = model()
    with torch.no_grad():
        module.blocks[1].mixer.k.weight[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.1\.mixer\.k: nf4: .*finite"):
        quantise(module, Quantise.Config())


def test_configurations_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="'nf5'"):
        Quantise.Config(kind="nf5")
    with pytest.raises(InputError, match="block=63"):
        Quantise.Config(block=63)
    with pytest.raises(InputError, match="'fp5'"):
        Quantise.Config(embedding="fp5")


def test_double_quantisation_saves_what_the_paper_says() -> None:
    """0.373 bits a parameter, some 3 GB of a model of 65 B (Dettmers et al. 2023, sec. 3)."""
    x = torch.zeros(1 << 20)
    saved = blockwise(x, "nf4", double=False).nbytes - blockwise(x, "nf4").nbytes
    assert saved * 8 / len(x) == pytest.approx(0.373, abs=5e-4)
    assert saved / len(x) * llama.sized("65B").num_parameters() == pytest.approx(3.0e9, rel=0.03)


def test_quantised_layers_become_plain_ones_again() -> None:
    module = quantised(embedding="int8")
    before = logits(module)
    assert dequantise(module) is module and not any(isinstance(part, QuantisedLinear) for part in module.modules())
    assert module.head.weight is module.embedding.weight and torch.allclose(logits(module), before, atol=1e-5)


# under LoRA


def test_only_adapters_get_gradients_and_learn() -> None:
    module = quantised()
    before = {name: x.clone() for name, x in module.named_buffers()}
    adapt(module, Lora.Config(rank=4, targets="all-linear"))
    assert torch.equal(logits(module), logits(quantised()))
    module.embedding.weight.data *= 20  # the head's too: else its logits are too small to learn by
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(module(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    assert all(torch.equal(x, before[name.replace(".base", "")]) for name, x in module.named_buffers())


def test_gradients_of_adapters_are_those_over_the_dequantised_base() -> None:
    found = []
    for plain in (False, True):
        module = quantised()
        if plain:
            for name, part in list(module.named_modules()):
                if isinstance(part, QuantisedLinear):
                    layer = nn.Linear(part.in_features, part.out_features, bias=False)
                    layer.weight.data.copy_(part.dequantised())
                    module.set_submodule(name, layer)
        adapt(module, Lora.Config(rank=4, targets=("q", "v", "up")), seed=3)
        for name, p in module.named_parameters():
            if name.endswith(".B"):
                p.data.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
        module(IDS).logits.square().mean().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    one, other = found
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-7), name


# files


@pytest.mark.parametrize(
    ("kind", "options"),
    [("nf4", {}), ("fp4", {"double": False}), ("int4", {}), ("int8", {"block": 32}), ("nf4", {"embedding": "int8"})],
)
def test_a_folder_comes_back_bit_for_bit(kind: str, options: dict, tmp_path: Path) -> None:
    module = quantised(kind, **options)
    save(module, tmp_path)
    again = load_module(tmp_path)
    assert torch.equal(logits(module), logits(again))
    assert {name: tuple(x.shape) for name, x in again.named_buffers()} == {
        name: tuple(x.shape) for name, x in module.named_buffers()
    }
    assert again.head.weight is again.embedding.weight
    save(again, tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_layouts_that_move_rows_are_written_as_our_own(tmp_path: Path) -> None:
    """GPT-2's file has queries, keys and values in one transposed matrix, which cannot be cut into the same blocks."""
    torch.manual_seed(0)
    module = gpt2.architecture(vocab_size=97, context=16, dim=64, num_layers=1, num_heads=4).build().eval()
    quantise(module, Quantise.Config())
    save(module, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "allyouneed"
    again = load_module(tmp_path)
    assert torch.equal(logits(module), logits(again))
    assert again.blocks[0].mixer.q.bias is not None


def test_bits_a_parameter_on_file(tmp_path: Path) -> None:
    config = SMALL.replace(dim=512, num_layers=1)
    config = config.replace(blocks=llama.architecture(
        vocab_size=97, context=64, dim=512, num_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=1024, tied=True
    ).blocks)  # fmt: skip
    module = model(config)
    numbers = sum(p.numel() for name, p in module.named_parameters() if name.startswith("blocks") and p.dim() == 2)
    quantise(module, Quantise.Config())
    save(module, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    parts = ("_proj.weight", ".absmax", ".nested_absmax")
    assert 8 * sum(x.nbytes for name, x in stored.items() if name.endswith(parts)) / numbers == pytest.approx(
        4.127, abs=1e-3
    )


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_transformers_reads_our_folder(kind: str, double: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    module = quantised(kind, double=double)
    save(module, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()  # in evaluation it computes in bf16
    assert type(theirs.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(module)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_we_read_what_transformers_quantised(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    oracles.llama(hidden_size=64, intermediate_size=128, num_attention_heads=4).save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32
    ).train()
    theirs.save_pretrained(tmp_path / "quantised")
    module = load_module(tmp_path / "quantised")
    assert isinstance(module.blocks[0].mixer.q, QuantisedLinear)
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(module)).abs().max() < 1e-5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(quantised(), tmp_path)
    return tmp_path


NAME = "model.layers.0.mlp.up_proj.weight"


def test_parts_that_do_not_belong_together_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path)
    state = json.loads(bytes(stored[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist()))

    def said(**changes) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(state | changes).encode()), dtype=torch.uint8)

    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    for changes, message in [
        ({f"{NAME}.absmax": None}, r"absmax' is missing"),
        ({NAME: stored[NAME][:-1]}, r"4095 of torch.uint8, 4096 of torch.uint8 are needed"),
        ({f"{NAME}.nested_absmax": stored[f"{NAME}.nested_absmax"].half()}, r"torch.float16, 1 of torch.float32"),
        ({f"{NAME}.quant_map": stored[f"{NAME}.quant_map"].flip(0)}, "another code book"),
        ({key: torch.zeros(3, dtype=torch.uint8)}, "not JSON"),
        ({key: torch.zeros(5000, dtype=torch.uint8)}, "at most 4096 bytes"),
        ({key: said(quant_type="nf3")}, "quant_type"),
        ({key: said(blocksize=48)}, "blocksize"),
        ({key: said(shape=[128])}, "shape"),
        ({key: said(shape=[128, 1 << 40])}, "shape"),
        ({key: said(shape=[128, 32])}, "are needed"),
        ({key: said(nested_blocksize=128)}, "nested_blocksize"),
        ({key: said(nested_offset=float("nan"))}, "nested_offset"),
    ]:
        broken = {name: x for name, x in (stored | changes).items() if x is not None}
        save_file(broken, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message) as error:
            load_module(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_mutated_files_are_read_or_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()

    def used(_: Path) -> None:
        logits(load_module(folder))

    used(path)  # kernels are compiled
    outcomes = [survives(used, path, mutated, named=str(folder)) for mutated in mutations(data, 60, seed=2)]
    path.write_bytes(data)
    assert len(outcomes) == 60
    logits(load_module(folder))


# the command


def test_quantize_writes_a_folder_that_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "source"
    save(model(SMALL.replace(vocab_size=257)), source, byte_tokenizer())
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), "--kind", "nf4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "nf4" and 4.127 <= facts["bits"] < 4.6
    assert facts["resident_bytes"] == resident(load_module(tmp_path / "out"))
    assert cli.main(["quantize", str(source), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), str(tmp_path / "other"), "--kind", "nf"]) == 2
    assert "unknown kind of quantisation 'nf'" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_finetune_over_a_base_in_four_bits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = model(SMALL.replace(vocab_size=257))
    base.embedding.weight.data *= 20  # the head's too: else its logits are too small to learn by
    save(base, tmp_path / "base", byte_tokenizer())
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    rows = [{"prompt": f"{i} ", "completion": "is it"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["finetune", str(tmp_path / "base"), str(data), "--out", str(out), "--quantize", "nf4", "--lr", "0.01"]
    assert cli.main(asked) == 2
    assert "--quantize nf4: what is stored in few bits is not trained; add --lora R" in capsys.readouterr().err
    longer = ["--lora", "4", "--lora-targets", "all-linear", "--epochs", "15", "--batch", "4"]
    assert cli.main([*asked, *longer, "--paged", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nats_per_token"] < 0.5 * found["nats_per_token_before"], found
    assert (out / "model" / "adapter_model.safetensors").is_file()
    stored = load_file(next((out / "checkpoints").glob("step-*")) / "model.safetensors")
    assert stored and all("adapters" in name for name in stored)
    assert cli.main(["merge", str(tmp_path / "base"), str(out / "model"), str(tmp_path / "merged")]) == 0
    load_module(tmp_path / "merged")


@pytest.mark.parametrize("embedding", [None, "int8"])
def test_smollm2_takes_a_third_of_its_bf16_weights(embedding: str | None) -> None:
    """The layers alone 0.26; with a table of 28 of 135 million numbers only if that is stored in few bits as well."""
    module = load_module("smollm2-135m-instruct", packed=True)
    count = 134_515_008
    layers = quantise(module, Quantise.Config(embedding=embedding))
    share = sum(module.get_submodule(name).weight.blocks.nbytes for name in layers if name.startswith("blocks")) / (
        2 * sum(module.get_submodule(name).weight.shape.numel() for name in layers if name.startswith("blocks"))
    )
    assert share == pytest.approx(4.127 / 16, abs=1e-4)
    assert resident(module) <= 0.35 * 2 * count


# One precision, and rows of tables


@pytest.mark.parametrize("rows", [3, 200])
def test_products_under_autocast_are_of_fp32(rows: int) -> None:
    layer = QuantisedLinear.of(nn.Linear(64, 32), "nf4")
    x = torch.randn(rows, 64, requires_grad=True)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        found.square().sum().backward()
    assert found.dtype is wanted.dtype and torch.equal(found, wanted)
    expected = 2 * wanted.detach() @ layer.dequantised()
    assert x.grad is not None and torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("double", [True, False])
def test_rows_are_those_of_the_whole_table(kind: str, double: bool) -> None:
    blocks = blockwise(torch.randn(700, 128), kind, double=double)
    ids = torch.tensor([[699, 0], [130, 130]])
    assert torch.equal(blocks.rows(ids), blocks.dequantised()[ids])
    assert blocks.rows(ids[:0]).shape == (0, 2, 128)


def test_rows_unpack_no_scale_but_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allyouneed.nn.blockwise.Scales.exact", lambda _: pytest.fail("all scales of a table"))
    assert blockwise(torch.randn(700, 128), "int8").rows(torch.tensor([5])).shape == (1, 128)


def test_adapted_modules_and_tables_that_are_stored_so_are_refused() -> None:
    module = model()
    adapt(module, Lora.Config(rank=2, targets=("q",)))
    with pytest.raises(InputError, match="adapters are joined to the module"):
        quantise(module, Quantise.Config(embedding="int8"), targets=("k",))
    module = quantised(embedding="int8")
    with pytest.raises(InputError, match="embedding: a QuantisedEmbedding cannot be quantised"):
        quantise(dequantised_layers(module), Quantise.Config(embedding="int8"))


def dequantised_layers(module: Decoder) -> Decoder:
    """With plain linear layers in the blocks, and the table as it is."""
    dequantise(module.blocks)
    return module


# What a job of finetuning keeps in memory


def prepared(name: object, tmp_path: Path) -> nn.Module:
    """The module that `finetune --lora 8 --quantize nf4` trains."""
    from allyouneed.commands import quantising
    from allyouneed.commands.methods.base import Task, adapted

    lora = Lora.Config(rank=2, targets=("q", "v"))
    task = Task(
        method="sft", data=tmp_path, valid=None, length=None, seed=0, out=tmp_path, bad=None, options={},
        lora=lora, quantise=quantising.config("nf4", lora),
    )  # fmt: skip
    return adapted(load_module(name, packed=True, narrow=True), task)


def test_the_base_of_a_job_takes_a_third_of_bf16(tmp_path: Path) -> None:
    """Of a folder in bf16, whose large table would alone be half; and of a GGUF, whose 8-bit table stays."""
    config = llama.architecture(
        vocab_size=4096, context=64, dim=256, num_layers=4, num_heads=4, num_kv_heads=2, hidden_dim=1024, tied=True
    )
    plain = model(config)
    save(plain.bfloat16(), tmp_path)
    module = prepared(tmp_path, tmp_path)
    assert isinstance(module.embedding, QuantisedEmbedding) and module.head.weight is module.embedding.weight
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    adapters = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert resident(module) - adapters <= 0.35 * 2 * sum(p.numel() for p in plain.parameters())
    reference = load_module(tmp_path)
    quantise(reference, Quantise.Config(embedding="int8"))
    assert torch.equal(logits(module), logits(reference))


def test_the_base_of_a_job_over_a_gguf_takes_a_third_of_bf16(tmp_path: Path) -> None:
    module = prepared("smollm2-135m-instruct", tmp_path)
    assert isinstance(module.embedding, PackedEmbedding)
    adapters = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert resident(module) - adapters <= 0.35 * 2 * 134_515_008


def test_packed_layers_become_plain_ones_too() -> None:
    module = model()
    pack(module, next(iter(KINDS)))
    before = logits(module)
    dequantise(module)
    assert type(module.head) is nn.Linear and module.head.weight is module.embedding.weight
    assert torch.allclose(logits(module), before, atol=1e-4)
