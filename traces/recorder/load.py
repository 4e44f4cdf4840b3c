"""A Hugging Face model, and what turns a prompt into its token ids.

A folder is read without any network use; a model is fetched only if its hub name was given. Weights are read from
safetensors alone, and no code that comes with a model is run, but for chat templates, which transformers renders in a
sandbox.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertflow.keys import near_to
from traces.container import TraceError
from traces.extras import install

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Tokenize = Callable[[int, dict[str, Any]], list[int]]
"""(line, table of one prompt as `traces.recorder.prompts` gives it) → token ids."""


def load_model(model: str, dtype: str, device: str, chat: bool) -> tuple[Any, Tokenize]:
    """The network in eval mode on its device, and what turns a prompt into token ids."""
    local = Path(model).is_dir()
    if not local:
        _check_hub_name(model)
    if local:
        # Read when the hub's client is first imported: nothing may be fetched for a folder.
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise TraceError(f"recording needs {error.name}; {install(error.name or '', 'record')}") from None
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    place = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    safe: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        target = torch.device(place)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, **safe
        )
        network = network.to(target).eval()
    except Exception as error:  # whatever the library makes of a damaged config.json or of weights that are none
        raise TraceError(f"model={model} on device={place} cannot be loaded ({first_line(error)})") from None
    return network, _tokenizer_of(transformers, model, safe, chat)


def _check_hub_name(model: str) -> None:
    """TraceError unless `model` is ORG/NAME of a hub, and no path that is mistyped: only for that the network is
    asked."""
    path = Path(model)
    hint = near_to(path.name, _folders_in(path.parent), f"{path.parent}/" if path.parent != Path() else "")
    is_name = _HUB_NAME.fullmatch(model) is not None
    if is_name and path.parent.is_dir():
        remedy = f"the hub's {model} is recorded from a folder without {path.parent}/"
        raise TraceError(
            f"option model={model} is no folder, though {path.parent} is one{hint}; check the path, or {remedy}"
        )
    if not is_name:
        raise TraceError(f"option model={model} is no folder, and no name on the hub (ORG/NAME){hint}; check the path")


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _tokenizer_of(transformers: Any, model: str, safe: dict[str, Any], chat: bool) -> Tokenize:
    """The tokenizer is loaded with the first prompt that is a text. safe: how `from_pretrained` is called."""
    loaded: list[Any] = []

    def tokenize(line: int, prompt: dict[str, Any]) -> list[int]:
        if "tokens" in prompt:
            return list(prompt["tokens"])
        try:
            if not loaded:
                loaded.append(transformers.AutoTokenizer.from_pretrained(model, **safe))
            messages = prompt.get("messages")
            if messages is None and chat:
                messages = [{"role": "user", "content": prompt["prompt"]}]
            if messages is None:
                return list(loaded[0](prompt["prompt"])["input_ids"])
            text = loaded[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(loaded[0](text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # A tokenizer, and the template of a model, may fail in any way.
            problem = f"prompt of line {line}: cannot be turned into tokens ({first_line(error)})"
            raise TraceError(f"{problem}; give token ids in a .jsonl file, or a model with a tokenizer") from None

    return tokenize


def first_line(error: Exception) -> str:
    """What an error says first, in at most 300 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
