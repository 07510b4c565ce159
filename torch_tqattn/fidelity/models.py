"""Models whose attention can be given other keys and values to read: any callable, and Hugging Face's causal LMs."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .candidates import Substitute
from .extra import require

# The attention function that HuggingFaceModel registers with transformers.
ATTENTION = "tqattn_fidelity"
# Exact logits are kept for the next candidate up to this size; those of the newest text always.
MAX_EXACT_BYTES = 1 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Text:
    """A piece of text: tokens int64 [1, T], and the bytes that tokens[0, 1:], which are predicted, stand for."""

    tokens: Tensor
    nbytes: int


class Model(ABC):
    """A decoder, seen from its attention. `shapes` are the (kv_heads, head_dim) of each layer that has run."""

    name: str
    device: torch.device
    prefix: tuple[int, ...] = ()  # tokens that texts begin with

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self._exact: dict[Text, Tensor] = {}

    @abstractmethod
    def logits(self, tokens: Tensor, substitute: Substitute | None = None) -> Tensor:
        """Logits after each of the tokens [1, T], float32 [T, vocab]; layers read what `substitute` gives them."""

    @abstractmethod
    def encode(self, text: bytes) -> tuple[list[int], list[int]]:
        """The tokens of a text, without any that stand for nothing in it, and the byte that each ends before."""

    def all_shapes(self) -> dict[int, tuple[int, int]]:
        """`shapes` of all layers, in order; a model that has not run yet runs on one token."""
        if not self.shapes:
            self.logits(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        return dict(sorted(self.shapes.items()))

    def exact_logits(self, text: Text) -> Tensor:
        """The model's own logits of a text, computed once."""
        if text not in self._exact:
            self._exact[text] = self.logits(text.tokens.to(self.device))
            sizes = {old: logits.nbytes for old, logits in self._exact.items()}
            for old in list(sizes)[:-1]:
                if sum(sizes.values()) > MAX_EXACT_BYTES:
                    del self._exact[old], sizes[old]
        return self._exact[text]


class CallableModel(Model):
    """A byte-level decoder that is called as model(tokens, attend) and returns logits [1, T, 256].

    It calls `attend(layer, q, k, v) -> out` once per layer, with q [1, Hq, T, D] and k, v [1, Hkv, T, D] after the
    rotary embedding and out [1, Hq, T, D]. Logits are scaled by 1 / sqrt(D), and every earlier token is seen.
    """

    def __init__(
        self, model: Callable[[Tensor, Attend], Tensor], name: str = "model", device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.name = name
        self.device = torch.device(device)
        self._model = model

    @torch.no_grad()
    def logits(self, tokens: Tensor, substitute: Substitute | None = None) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.shapes[layer] = (k.shape[1], k.shape[3])
            if substitute is None:
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outs = []
            for queries, keys, values in substitute(layer, q, k, v):
                rows = (q[:, :, queries], keys.to(k.dtype), values.to(v.dtype))
                mask = causal_mask(queries, q.device)
                outs.append(functional.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True))
            return torch.cat(outs, dim=2)

        return self._model(tokens, attend)[0].float()

    def encode(self, text: bytes) -> tuple[list[int], list[int]]:
        return list(text), list(range(1, len(text) + 1))


class HuggingFaceModel(Model):
    """A causal language model of transformers (from 5.20 on), and its tokenizer; bytes are its tokens without one.

    Its own attention function is called with the keys and values to read, so that sliding windows, softcap and
    attention sinks stay as they are.
    """

    def __init__(self, model: Any, tokenizer: Any = None, name: str | None = None) -> None:
        super().__init__()
        self._transformers = require("transformers")
        self.name = name or type(model).__name__
        self.device = model.device
        self._model = model
        self._tokenizer = tokenizer
        vocabulary = model.config.get_text_config().vocab_size
        if tokenizer is None and vocabulary != 256:
            raise ValueError(f"{self.name} has no tokenizer, and its {vocabulary} tokens are not bytes")
        if tokenizer is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
            self.prefix = (tokenizer.bos_token_id,)

    @classmethod
    def load(cls, name_or_path: str, device: str = "cpu", dtype: str = "float32") -> "HuggingFaceModel":
        """From a directory or the Hugging Face hub; a directory without a tokenizer is a model of bytes."""
        transformers = require("transformers")
        directory = Path(name_or_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(name_or_path, dtype=getattr(torch, dtype))
        tokenizer = None
        if not directory.is_dir() or any((directory / name).exists() for name in TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
        name = "/".join(directory.resolve().parts[-2:]) if directory.is_dir() else name_or_path
        return cls(model.to(device).eval(), tokenizer, name)

    @torch.no_grad()
    def logits(self, tokens: Tensor, substitute: Substitute | None = None) -> Tensor:
        usual = self._model.config._attn_implementation
        masks = self._transformers.AttentionMaskInterface
        self._transformers.AttentionInterface.register(ATTENTION, partial(self._attend, usual, substitute))
        masks.register(ATTENTION, masks()[usual])
        self._model.set_attn_implementation(ATTENTION)
        self.shapes.clear()
        try:
            logits = self._model(input_ids=tokens, use_cache=False).logits[0].float()
        finally:
            self._model.set_attn_implementation(usual)
        if not self.shapes:
            raise ValueError(
                f"{self.name} does not call an attention function that can be registered with transformers"
            )
        return logits

    def _attend(
        self,
        usual: str,
        substitute: Substitute | None,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Called by transformers in each layer. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
        self.shapes[module.layer_idx] = (key.shape[1], key.shape[3])
        if usual == "eager":
            attend = sys.modules[type(module).__module__].eager_attention_forward  # each model's file has its own
        else:
            attend = self._transformers.AttentionInterface()[usual]
        if substitute is None:
            return attend(module, query, key, value, attention_mask, **options)
        outs = []
        for queries, keys, values in substitute(module.layer_idx, query, key, value):
            if attention_mask is None:  # what transformers passes for plain causal attention
                mask = causal_mask(queries, query.device)
            else:
                mask = attention_mask[:, :, queries, : queries.stop]
            rows = (query[:, :, queries], keys.to(key.dtype), values.to(value.dtype))
            outs.append(attend(module, *rows, mask, **options)[0])
        return torch.cat(outs, dim=1), None

    def encode(self, text: bytes) -> tuple[list[int], list[int]]:
        if self._tokenizer is None:
            return list(text), list(range(1, len(text) + 1))
        characters = text.decode(errors="replace")
        encoded = self._tokenizer(characters, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0, *accumulate(len(character.encode()) for character in characters)]
        return encoded.input_ids, [ends[end] for _, end in encoded.offset_mapping]


def causal_mask(queries: slice, device: torch.device) -> Tensor:
    """bool [1, 1, queries, positions up to the last of them], True where a query may look."""
    positions = torch.arange(queries.stop, device=device)
    return (positions <= positions[queries, None])[None, None]


def cut(model: Model, text: bytes, context: int, windows: int) -> list[Text]:
    """`windows` pieces of a text, `context` tokens each, spread evenly over it.

    Raises:
        ValueError: the text is too short for them.
    """
    if context < 2 or windows < 1:
        raise ValueError(f"at least 1 window of at least 2 tokens is needed, got {windows} of {context}")
    tokens, ends = model.encode(text)
    size = context - len(model.prefix)
    if len(tokens) < windows * size:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for {windows} windows of {context}: take a longer text, "
            "fewer windows or a shorter context"
        )
    pieces = []
    for i in range(windows):
        begin = (len(tokens) - size) * i // max(1, windows - 1)
        piece = [*model.prefix, *tokens[begin : begin + size]]
        first_predicted = begin + 1 - len(model.prefix)
        before = ends[first_predicted - 1] if first_predicted else 0
        pieces.append(Text(torch.tensor([piece]), ends[begin + size - 1] - before))
    return pieces
