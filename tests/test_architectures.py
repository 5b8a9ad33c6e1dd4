"""The architectures as lists of parts: all are found, what is said is what is built, and the page says it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

import pytest

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.models import gpt2, gpt3, marian, t5
from allyouneed.models.architectures import (
    architectures,
    by_parts,
    facts,
    outline,
    parts,
    sized_facts,
    sizes_in,
)
from allyouneed.models.checkpoints.huggingface import FAMILIES
from allyouneed.papers import architecture_page

BY_MODULE = {one.module: one for one in architectures()}


def test_the_page_says_what_the_configurations_say():
    path = architecture_page.target()
    assert path.read_text() == architecture_page.page(), f"{path} is stale; run `allyouneed publish --pages`"


def test_every_family_of_checkpoints_is_there():
    for families in FAMILIES.values():
        for family in families:
            module = sys.modules[family.read.__module__].__name__.rpartition(".")[2]
            assert module in BY_MODULE, module
    assert {"transformer", "gpt3", "recurrent", "recurrent_translator"} < set(BY_MODULE)


@pytest.mark.parametrize("module", BY_MODULE)
def test_titles_are_short_and_the_words_explain(module):
    one = BY_MODULE[module]
    assert len(one.title) < 40 and one.words.startswith(one.title) and one.words.endswith(".") and one.year > 2000


@pytest.mark.parametrize("module", [name for name, one in BY_MODULE.items() if "" not in one.sizes])
def test_a_size_that_nobody_published_is_refused_in_one_line(module):
    with pytest.raises(InputError, match="unknown size"):
        importlib.import_module(f"allyouneed.models.{module}").sized("999Q")


def test_every_part_of_the_model_is_listed():
    """The classes that the listing names are those of the model's modules, in their numbers."""
    config = marian.EXAMPLE
    built = [type(module).__name__ for module in config.build().modules()]
    for path, name in parts(config):
        if name in ("Attention", "CrossAttention", "MLP"):
            layers = config.encoder.num_layers if path[0] == "encoder" else config.decoder.num_layers
            listed = sum(c.num_layers for c in (config.encoder, config.decoder)) if name != "CrossAttention" else layers
            assert built.count(name) == listed
        elif not {"placement", "kernel"} & set(path):  # which are functions, no modules
            assert name in built


def test_a_part_that_nobody_foresaw_is_listed_with_its_settings():
    @dataclass(frozen=True, kw_only=True)
    class Router(Config):
        experts: int
        noise: float = 0.0

    @dataclass(frozen=True, kw_only=True)
    class Sparse(Config):
        hidden_dim: int
        router: Router

    block = gpt2.EXAMPLE.blocks[0].replace(channel=Sparse(hidden_dim=8, router=Router(experts=4)))
    config = gpt2.EXAMPLE.replace(blocks=(block,))
    assert (("blocks", "channel", "router"), "Router") in list(parts(config))
    assert "      router=Router(experts=4)," in outline(config, sized_facts({"": config}))


def test_sizes_of_other_parts_stand_apart():
    first, second = by_parts(t5.published())
    assert list(first) == [f"1.0 {name}" for name in t5.SIZES] and list(second) == [f"1.1 {name}" for name in t5.SIZES]


def test_a_number_that_varies_is_a_size_and_one_that_does_not_is_a_setting():
    sizes = {name: gpt3.sized(name) for name in ("6.7B", "13B")}
    windows = {"8": sizes["13B"], "16": sizes["13B"].replace(context=99, tied=False)}
    assert "window=256" in "".join(outline(sizes["13B"], sized_facts(sizes)))
    assert ("tied",) in sized_facts(windows) and ("tied",) not in sized_facts(sizes)
    rows = sizes_in(sizes)
    assert rows["13B"]["head_dim"] == 128 and rows["6.7B"]["head_dim"] is None
    assert rows["13B"]["parameters"] == sizes["13B"].num_parameters()


def test_stacks_of_unequal_height_have_a_column_each():
    (row,) = sizes_in({"": marian.EXAMPLE}).values()
    assert (row["encoder.num_layers"], row["decoder.num_layers"]) == (3, 2) and "num_layers" not in row


def test_scales_by_the_dimension_are_named():
    assert facts(t5.sized("base"))[("head_scale",)] == "1/√dim"
    assert facts(BY_MODULE["transformer"].sizes["big"])[("encoder", "embedding_scale")] == "√dim"
