"""What vLLM says of checkpoints, in its own code: run by hand where vLLM is installed, which needs no GPU.

    python tests/vllm_run.py

Each architecture of ours is written by `transformers`, and by `ayn.save`; vLLM's configuration has to take the folder,
its model to be built, and its loader to find a tensor for every parameter and a parameter for every tensor.
What it took of `transformers` is written to `golden/vllm.json`, against which `test_vllm` holds `ayn.save` anywhere.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from test_vllm import CANDIDATES, GOLDEN, written_by_transformers, written_by_us
from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model


def begin() -> None:
    """One process that is a group of its own, and the names of kernels that models look up when they are built."""
    kernels = torch.library.Library("_C", "FRAGMENT")
    for name in ("gelu_new", "gelu_fast", "gelu_quick"):
        if not hasattr(torch.ops._C, name):
            kernels.define(f"{name}(Tensor! out, Tensor input) -> ()")
    globals()["_kept"] = kernels
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/group", 0, "gloo")
        initialize_model_parallel(1, 1)


def take(folder: Path) -> str:
    """The class that vLLM loads a folder with.

    Raises:
        Exception: whatever it raises where it does not.
    """
    model_config = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, seed=0)
    load_config = LoadConfig(use_tqdm_on_load=False)
    config = VllmConfig(model_config=model_config, load_config=load_config, device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        model = initialize_model(config)
        DefaultModelLoader(load_config).load_weights(model, model_config)
    return type(model).__name__


def outcome(folder: Path) -> str:
    try:
        return take(folder)
    except Exception as error:
        return f"no: {' '.join(str(error).split())[:120]}"


def main() -> None:
    folders = {name: (Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())) for name in sys.argv[1:] or CANDIDATES}
    for architecture, (theirs, ours) in folders.items():  # all before vLLM changes classes of transformers
        written_by_transformers(architecture, theirs)
        written_by_us(theirs, ours)
    begin()
    taken: dict[str, dict[str, list[int]]] = {}
    for architecture, (theirs, ours) in folders.items():
        first, second = outcome(theirs), outcome(ours)
        print(f"{architecture}\n    of transformers: {first}\n    of ours:         {second}", flush=True)
        if not first.startswith("no"):
            with safe_open(theirs / "model.safetensors", "pt") as file:
                taken[architecture] = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    if not sys.argv[1:]:
        lines = [f"{json.dumps(name)}: {json.dumps(tensors)}" for name, tensors in taken.items()]
        told = ",\n".join([f'"vllm": {json.dumps(version("vllm").split("+")[0])}', *lines])
        GOLDEN.write_text("{" + told + "}\n")


if __name__ == "__main__":
    main()
