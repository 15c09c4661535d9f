"""From text to token ids and back: a checkpoint's own tokenizer where it has one, bytes otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from megamoe.errors import ArgumentError, CheckpointError
from megamoe.job.small_model import BYTES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def default_prompt() -> str:
    """The text that ships with megamoe."""
    return resources.files("megamoe.job").joinpath("default_prompt.txt").read_text("utf-8")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text to run on: `prompt`, or the contents of `file`, or the default text.

    Raises:
        ArgumentError: Both are given, the file cannot be read as UTF-8, or the text is empty.
    """
    if prompt is not None and file is not None:
        raise ArgumentError("--prompt", "--file as well", "only one of the two")
    if file is not None:
        try:
            prompt = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError("--file", f"{file} ({_why(error)})", "a readable UTF-8 text file") from error
    text = default_prompt() if prompt is None else prompt
    if not text:
        raise ArgumentError("--prompt" if file is None else "--file", "an empty text", "at least one character")
    return text


@dataclass(frozen=True)
class Codec:
    """Turns text into token ids (1, tokens) int64 and back.

    Attributes:
        name: "bytes", or the tokenizer's class.
        tokenizer: None for bytes.
    """

    name: str = "bytes"
    tokenizer: Any = None

    def encode(self, text: str) -> Tensor:
        """Token ids (1, tokens), int64, on the CPU."""
        if self.tokenizer is None:
            return torch.tensor([list(text.encode("utf-8"))], dtype=torch.int64)
        return torch.tensor([self.tokenizer(text)["input_ids"]], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """The text of token ids (tokens,); bytes that are not UTF-8 show as a replacement character."""
        if self.tokenizer is None:
            return bytes(ids.tolist()).decode("utf-8", errors="replace")
        return str(self.tokenizer.decode(ids.tolist()))


def codec_for(folder: Path | None, vocab_size: int) -> Codec:
    """The codec of a checkpoint folder; bytes where there is no tokenizer and the vocabulary has room for them.

    Raises:
        CheckpointError: The tokenizer's files cannot be read, or the vocabulary is smaller than 256 without one.
    """
    if folder is not None and any((folder / name).exists() for name in TOKENIZER_FILES):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {_why(error)}") from error
        return Codec(type(tokenizer).__name__, tokenizer)
    if vocab_size < BYTES:
        raise CheckpointError(f"{folder}: no tokenizer, and {vocab_size} tokens are too few for bytes ({BYTES})")
    return Codec()


def _why(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or str(error).partition("\n")[0]
