"""Text networks: TextCNN, BiLSTM, a small BERT, and Hugging Face classifiers from a local folder.

All take token ids int64 [B,L] and split their forward pass at the word embedding, since a trigger for text can only be
optimised there:

    forward(ids) = forward_embedded(embed(ids), ids)

``ids`` in the second half only mark which positions are padding.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, MissingExtra
from backdoorlab.core.paths import entries, is_file, read_bytes, reason, user_path
from backdoorlab.modalities.base import Modality, expect_modality
from backdoorlab.modalities.text import PAD, TextModality, load_tokenizer
from backdoorlab.models.classifier import ModelBuilder, models


class TextNet(nn.Module):
    """Base: what defenses in embedding space rely on."""

    pad_id: int = PAD

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings float [B,L,E] of token ids int64 [B,L]."""

    @abstractmethod
    def forward_embedded(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """Logits float [B,K] of embeddings [B,L,E]; positions where ``ids`` are padding are ignored."""

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B,L] -> logits [B,K]."""
        return self.forward_embedded(self.embed(ids), ids)


def word_embedding(num_tokens: int, size: int, std: float = 0.1) -> nn.Embedding:
    """Word vectors N(0, std^2), zero for padding.

    With torch's own N(0, 1) the network memorises texts by the random vectors and hardly moves them (TextCNN on
    SST-2: 75 % instead of 80 % test accuracy).
    """
    embedding = nn.Embedding(num_tokens, size, padding_idx=PAD)
    with torch.no_grad():
        embedding.weight.mul_(std)
    return embedding


class TextCNN(TextNet):
    """Convolutions over 3, 4 and 5 words, maximum over time, dropout, linear (Kim, EMNLP 2014).

    A window counts if it starts at a word: what lies behind is zeros, so the result does not depend on the padding.
    """

    def __init__(
        self,
        num_tokens: int,
        num_classes: int,
        size: int = 100,
        filters: int = 100,
        widths: tuple[int, ...] = (3, 4, 5),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.embedding = word_embedding(num_tokens, size)
        self.convs = nn.ModuleList([nn.Conv1d(size, filters, width) for width in widths])
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(filters * len(widths), num_classes)

    def embed(self, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.embed`."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def forward_embedded(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.forward_embedded`."""
        present = (ids != PAD).unsqueeze(1)
        sentence = embedded.transpose(1, 2) * present
        pooled = []
        for width, conv in zip(self.widths, self.convs, strict=True):
            padded = F.pad(sentence, (0, width - 1))
            pooled.append((F.relu(conv(padded)) * present).amax(2))
        logits: Tensor = self.linear(self.dropout(torch.cat(pooled, 1)))
        return logits


class BiLSTM(TextNet):
    """One LSTM in each direction, maximum over the words, dropout, linear.

    The backward LSTM reads each text reversed in place, so that neither direction passes through padding before words.
    """

    def __init__(
        self, num_tokens: int, num_classes: int, size: int = 100, hidden: int = 128, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.embedding = word_embedding(num_tokens, size)
        self.ahead = nn.LSTM(size, hidden, batch_first=True)
        self.back = nn.LSTM(size, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * hidden, num_classes)

    def embed(self, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.embed`."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def forward_embedded(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.forward_embedded`."""
        present = ids != PAD
        place = torch.arange(ids.shape[1], device=ids.device)
        # Reversal within the words; padding keeps its place. Maxima over time need no reversal back.
        mirrored = torch.where(present, present.sum(1, keepdim=True) - 1 - place, place).clamp_min(0)
        reverse = embedded.gather(1, mirrored.unsqueeze(2).expand_as(embedded))
        states = torch.cat([self.ahead(self.dropout(embedded))[0], self.back(self.dropout(reverse))[0]], 2)
        pooled = states.masked_fill(~present.unsqueeze(2), -1.0).amax(1)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits


class BertTiny(TextNet):
    """BERT encoder from random weights, mean over the words (our vocabulary has no [CLS]), dropout, linear."""

    def __init__(self, num_tokens: int, max_len: int, num_classes: int, size: int = 128, layers: int = 2) -> None:
        super().__init__()
        transformers = _transformers("the model 'bert_tiny'")
        config = transformers.BertConfig(
            vocab_size=num_tokens,
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=4 * size,
            max_position_embeddings=max_len,
            pad_token_id=PAD,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(0.1)
        self.linear = nn.Linear(size, num_classes)

    def embed(self, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.embed`."""
        embedded: Tensor = self.bert.get_input_embeddings()(ids)
        return embedded

    def forward_embedded(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.forward_embedded`."""
        present = ids != PAD
        states = self.bert(inputs_embeds=embedded, attention_mask=present.long()).last_hidden_state
        weight = present.unsqueeze(2).to(states.dtype)
        pooled = (states * weight).sum(1) / weight.sum(1).clamp_min(1)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits


class HuggingFaceText(TextNet):
    """A sequence classifier of transformers; its head is made new if the number of classes differs."""

    def __init__(self, folder: str, num_classes: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        transformers = _transformers("a Hugging Face model")
        check_folder(folder)
        try:
            with _quiet(transformers.utils.logging):
                self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
                    folder,
                    num_labels=num_classes,
                    ignore_mismatched_sizes=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
        except Exception as error:  # the library raises nearly anything for damaged files
            raise InputError(f"cannot load a text classifier from {folder!r}: {reason(error)}") from error

    def embed(self, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.embed`."""
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def forward_embedded(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """See :meth:`TextNet.forward_embedded`."""
        logits: Tensor = self.model(inputs_embeds=embedded, attention_mask=(ids != self.pad_id).long()).logits
        return logits


def check_folder(folder: str) -> None:
    """See that a local model is one whose loading runs no code of its own.

    Raises:
        InputError: if the folder has no ``config.json`` or no safetensors weights, names Python code of its own, or
            holds an adapter for another model.
    """
    base = user_path(folder)
    if not folder or not is_file(base / "config.json"):
        raise InputError(f"hf:{folder}: expected a local folder with config.json, weights and tokenizer")
    names = [path.name for path in entries(base)]
    for name in ("config.json", "tokenizer_config.json"):
        if name not in names:
            continue
        try:
            record = json.loads(read_bytes(base / name))
        except (ValueError, RecursionError) as error:
            raise InputError(f"hf:{folder}: {name} is no JSON: {reason(error)}") from None
        if not isinstance(record, dict):
            raise InputError(f"hf:{folder}: {name} must hold a JSON object")
        if "auto_map" in record:
            raise InputError(
                f"hf:{folder}: {name} names Python code of the model's own (auto_map), which is never run; use a "
                "model whose architecture is part of transformers, and delete auto_map if it is one"
            )
    if "adapter_config.json" in names:
        raise InputError(f"hf:{folder}: holds an adapter; merge it into its model (merge_and_unload) and save that")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
        why = (
            f" {pickled[0]} is not opened, since pickled weights can run code; where you trust it, convert it with "
            "transformers: from_pretrained(FOLDER).save_pretrained(FOLDER)"
            if pickled
            else ""
        )
        raise InputError(f"hf:{folder}: expected weights in *.safetensors, found none.{why}")


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bar and no warning that the head was made new."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers(feature: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra(feature, "text") from None
    return transformers


def _text(modality: Modality) -> TextModality:
    text = expect_modality(modality, TextModality)
    if len(text.vocabulary) < 8 and not text.tokenizer:
        raise InputError(
            "the vocabulary is empty: no word occurs twice in the training texts (trigger words such as 'cf' do not "
            "count), so there is nothing to learn from; give more texts, or longer ones"
        )
    return text


class _Text(ModelBuilder):
    modalities = ("text",)


@models.register
class BuildTextCNN(_Text):
    """The default for texts."""

    name = "textcnn"
    summary = "TextCNN (100-dimensional words, 100 filters each over 3, 4, 5 words): default for texts"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return TextCNN(_text(modality).num_tokens, num_classes)


@models.register
class BuildBiLSTM(_Text):
    """The recurrent one."""

    name = "lstm"
    summary = "bidirectional LSTM (128 units each way), maximum over the words"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return BiLSTM(_text(modality).num_tokens, num_classes)


@models.register
class BuildBertTiny(_Text):
    """The attentive one."""

    name = "bert_tiny"
    summary = "BERT of 2 layers, width 128, 2 heads, from random weights (extra 'text')"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        text = _text(modality)
        return BertTiny(text.num_tokens, text.max_len, num_classes)


@models.register
class BuildHuggingFaceText(_Text):
    """Pre-trained ones, with their own tokenizer."""

    name = "hf:"
    summary = "hf:FOLDER, a transformers sequence classifier with its tokenizer, in a local folder (extra 'text')"

    def adapt(self, modality: Modality) -> Modality:
        """Tokenise with the folder's tokenizer; sub-words need about half as many positions again."""
        text, folder = _text(modality), str(user_path(self.argument))
        if text.tokenizer == folder:
            return text
        check_folder(folder if self.argument else "")
        transformers = _transformers("a Hugging Face model")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            places = int(getattr(config, "max_position_embeddings", 512))
        except Exception as error:  # the library raises nearly anything for odd settings
            raise InputError(f"hf:{self.argument}: config.json cannot be used: {reason(error)}") from error
        longest = min(load_tokenizer(folder).model_max_length, places - 2)
        return dataclasses.replace(text, tokenizer=folder, max_len=min(text.max_len * 3 // 2 + 2, longest))

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return HuggingFaceText(_text(modality).tokenizer, num_classes, _text(modality).pad_id)
