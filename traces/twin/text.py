"""The text that twins learn from, and its tokens: documents, their split by content, a tokenizer of our own.

The documents are what each Python installation carries: the standard library's sources, the topics of `help()`, and
the documentation of built-in names. Which side of a split a document falls on follows from its content alone. Knows no
model.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import os
import pydoc
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.container import fault
from traces.reading import read_text

SPLITS = ("learn", "train", "eval")
"""learn: what the twin is trained on. train and eval: held out from it; recorded, to fit predictors and to judge."""
END = "<|end|>"
LICENSE = "PSF-2.0"
_HELD_OUT_PERCENT = 15
_EVAL_PERCENT = 4
# Tests are not installed everywhere; encodings are tables, each almost a copy of the next, on both sides of any split.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_SKIPPED_FILES = ("topics.py", "_sysconfigdata")  # the topics come as text; the other holds paths of one machine
_MIN_BYTES, _MAX_BYTES = 200, 1 << 20
_MAX_TOKENIZER_BYTES = 16 << 20
_REMEDY = "train the twin again in a new folder"


@dataclass(frozen=True)
class Document:
    """A text with its name and the SHA-256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str

    @property
    def split(self) -> str:
        """One of `SPLITS`, by content."""
        place = int(self.sha256[:8], 16) % 100
        return "eval" if place < _EVAL_PERCENT else "train" if place < _HELD_OUT_PERCENT else "learn"


def load_documents(folder: Path | None = None) -> list[Document]:
    """All documents, ordered by name, each content once; with `folder`, the .py, .txt, .md and .rst files in it.

    ValueError where a folder holds none.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"text={folder} is no folder; name one that holds .py, .txt, .md or .rst files")
    found = _files(folder, (".py", ".txt", ".md", ".rst")) if folder is not None else _installed()
    documents: dict[str, Document] = {}
    for name, text in sorted(found):
        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
        documents.setdefault(digest, Document(name, text, digest))
    if not documents:
        raise ValueError(f"text={folder or 'the standard library'} holds no document of {_MIN_BYTES} bytes or more")
    return list(documents.values())


def _installed() -> Iterator[tuple[str, str]]:
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), (".py",))
    topics: dict[str, Any] = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        if len(text) >= _MIN_BYTES:
            yield f"topic/{name}", str(text)
    for name in sorted(vars(builtins)):
        value = getattr(builtins, name)
        # What help() says of exceptions is nearly the same for all: it would lie on both sides of the split.
        if isinstance(value, type) and not issubclass(value, BaseException) and not name.startswith("_"):
            yield f"builtin/{name}", pydoc.plain(pydoc.render_doc(value))


def _files(root: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if not name.endswith(endings) or name.startswith(_SKIPPED_FILES) or not path.is_file():
                continue
            if not _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
                continue
            try:
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few sources are in other encodings on purpose


def text_digest(documents: Sequence[Document]) -> str:
    """SHA-256 of all contents, in order."""
    return hashlib.sha256("".join(document.sha256 for document in documents).encode()).hexdigest()


class Tokenizer:
    """Text to token ids and back: byte-level BPE, or plain bytes. `end` is the id that closes a document."""

    def __init__(self, bpe: Any | None = None) -> None:
        self._bpe = bpe
        self.size = 257 if bpe is None else int(bpe.get_vocab_size())
        self.end = 256 if bpe is None else self._end_of(bpe)

    @staticmethod
    def _end_of(bpe: Any) -> int:
        end = bpe.token_to_id(END)
        if end is None:
            raise ValueError(f"it lacks the token {END}")
        return int(end)

    @staticmethod
    def train(texts: Sequence[str], size: int) -> Tokenizer:
        """A byte-level BPE of at most `size` tokens; ValueError where the package tokenizers is missing."""
        package = _package()
        bpe = package.Tokenizer(package.models.BPE())
        bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = package.decoders.ByteLevel()
        alphabet = package.pre_tokenizers.ByteLevel.alphabet()
        trainer = package.trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        return Tokenizer(bpe)

    @staticmethod
    def read(path: Path) -> Tokenizer:
        """What `text` gave, from a file; an empty one means bytes. ValueError on anything else."""
        text = read_text(path, _MAX_TOKENIZER_BYTES, _REMEDY)
        if not text:
            return Tokenizer()
        package = _package()
        try:
            return Tokenizer(package.Tokenizer.from_str(text))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises no narrower one, and panics where it did not look
            problem = " ".join(str(error).split())[:200] or type(error).__name__
            raise fault(path, "file", f"is no tokenizer ({problem})", _REMEDY) from None

    def text(self) -> str:
        """What a file of it holds."""
        return "" if self._bpe is None else str(self._bpe.to_str())

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Token ids int32 of each text, without `end`."""
        if self._bpe is None:
            return [np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32) for text in texts]
        return [np.array(item.ids, np.int32) for item in self._bpe.encode_batch(list(texts), add_special_tokens=False)]


def _package() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        remedy = "install expertflow[record], or train with --tokenizer=bytes"
        raise ValueError(f"the package tokenizers is not installed; {remedy}") from None


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """All documents' tokens one after the other, each closed by `end`."""
    pieces = []
    for ids in tokenizer.encode([document.text for document in documents]):
        pieces += [ids, np.array([tokenizer.end], np.int32)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)
