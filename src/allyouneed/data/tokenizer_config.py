"""What stands beside `tokenizer.json` in a folder of the Hugging Face layout: settings, roles, the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json, read_text


def chat_template(folder: Path, config: dict[str, Any], config_path: Path) -> str | None:
    """The template in a file of its own, or else in `tokenizer_config.json`; of several the `default` one.

    Raises:
        InputError: it is no text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, limit=4 << 20)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {
            entry["name"]: entry.get("template") for entry in template if isinstance(entry, dict) and "name" in entry
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{config_path}: chat_template is no text")
    return template


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none.

    Raises:
        InputError: something else is in it.
    """
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value
