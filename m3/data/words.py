"""Vocabularies: from sentences to token ids and back, by whichever library made the vocabulary.

A vocabulary is described by one string, which stands in the model's config so that no file is needed later:
`words:a b c` (a closed list of whole words), `tokenizers:{...}` (the JSON of Hugging Face's `tokenizers`,
WordPiece, BPE or Unigram), `sentencepiece:BASE64`, `open_clip:NAME`.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import NamedTuple, Protocol

from m3.errors import M3Error

UNKNOWN = "[UNK]"

BLANKS = ("Ġ", "▁")
"""How byte-level BPE and sentencepiece write the blank in front of a word."""


class Edges(NamedTuple):
    """Where words are cut: before an id that begins one and behind an id that ends one.

    Attributes:
        begins: for each id of the vocabulary, True where it begins a word.
        ends: for each id of the vocabulary, True where it ends a word.
    """

    begins: list[bool]
    ends: list[bool]


class Vocabulary(Protocol):
    """What text needs of a vocabulary."""

    size: int

    def number(self, token: str) -> int | None:
        """Return the id of one token as the vocabulary writes it, e.g. `</s>`; None: it has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn a sentence into ids."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Turn ids into a sentence."""
        ...

    def word_edges(self) -> Edges:
        """Return which ids begin and which end a word, for masks that hide whole words."""
        ...


def describe(vocabulary: str | list[str]) -> str:
    """Return the string that describes a vocabulary completely, reading the file that a path names.

    Args:
        vocabulary: a list of words, such a string already, or the path of a `tokenizer.json` or of a
            sentencepiece `.model`.

    Raises:
        M3Error: there is no such file, or it is of another kind.
    """
    if isinstance(vocabulary, list):
        if several := next((word for word in vocabulary if len(word.split()) != 1), None):
            raise M3Error(f"text.vocabulary: `{several}` is not one word; a list holds whole words without blanks.")
        return f"words:{' '.join(vocabulary)}"
    if vocabulary.partition(":")[0] in _KINDS:
        return vocabulary
    path = Path(vocabulary).expanduser()
    if not path.is_file():
        raise M3Error(f"there is no vocabulary {vocabulary}; make one with `m3 data vocabulary`, or list the words.")
    content = path.read_bytes()
    if path.suffix == ".json" and _is_utf8(content):
        return f"tokenizers:{content.decode()}"
    if path.suffix == ".model":
        return f"sentencepiece:{base64.b64encode(content).decode()}"
    raise M3Error(f"{path} is no vocabulary that is known; give a tokenizer.json or a sentencepiece .model.")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def open_vocabulary(description: str) -> Vocabulary:
    """Make a vocabulary from its description."""
    kind, _, content = description.partition(":")
    return _KINDS[kind](content)


class Words:
    """A closed list of whole words, divided by blanks, small and capital letters alike; id 0 is for all others."""

    def __init__(self, content: str) -> None:
        self.words = [UNKNOWN, *content.lower().split()]
        if len(set(self.words)) != len(self.words) or len(self.words) < 2:
            raise M3Error("text.vocabulary: the words must be at least one, and all different.")
        self.size = len(self.words)
        self._number = {word: number for number, word in enumerate(self.words)}

    def number(self, token: str) -> int | None:
        """Return the id of a word."""
        return self._number.get(token.lower())

    def encode(self, text: str) -> list[int]:
        """Turn a sentence into ids."""
        return [self._number.get(word, 0) for word in text.lower().split()]

    def decode(self, ids: list[int]) -> str:
        """Turn ids into a sentence."""
        return " ".join(self.words[i] for i in ids)

    def word_edges(self) -> Edges:
        """Say that every id is a word."""
        return Edges([True] * self.size, [True] * self.size)


class FromTokenizers:
    """WordPiece, BPE or Unigram of Hugging Face's `tokenizers`."""

    def __init__(self, content: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise M3Error(f"text.vocabulary is no tokenizer.json that can be read: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # numbers may be left out
        if not self.size:
            raise M3Error("text.vocabulary holds no tokens.")

    def number(self, token: str) -> int | None:
        """Return the id of a token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Turn a sentence into ids, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Turn ids into a sentence."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def word_edges(self) -> Edges:
        """Read how the model marks words; special tokens stand alone, as all do in a model without marks."""
        content = json.loads(self._tokenizer.to_str())
        model, special = content["model"], {token["id"] for token in content["added_tokens"]}
        pieces = {i: piece for piece, i in self._tokenizer.get_vocab().items()}
        inside, behind = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        is_marked = model["type"] != "WordLevel" and any(p.startswith(BLANKS) for p in pieces.values())
        edges = Edges([True] * self.size, [True] * self.size)
        for i in pieces.keys() - special:
            if behind:
                edges.begins[i], edges.ends[i] = False, pieces[i].endswith(behind)
            elif inside:
                edges.begins[i], edges.ends[i] = not pieces[i].startswith(inside), False
            elif is_marked:
                edges.begins[i], edges.ends[i] = pieces[i].startswith(BLANKS), False
        return edges


class FromSentencepiece:
    """A sentencepiece model."""

    def __init__(self, content: str) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise M3Error("this vocabulary needs sentencepiece; run `pip install sentencepiece`.") from error
        try:
            self._processor = SentencePieceProcessor(model_proto=base64.b64decode(content, validate=True))
        except (binascii.Error, RuntimeError) as error:
            raise M3Error(f"text.vocabulary is no sentencepiece model that can be read: {error}.") from error
        self.size = self._processor.get_piece_size() if content else 0
        if not self.size:
            raise M3Error("text.vocabulary is no sentencepiece model that can be read: it is empty.")

    def number(self, token: str) -> int | None:
        """Return the id of a piece."""
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None  # others get the unknown piece's

    def encode(self, text: str) -> list[int]:
        """Turn a sentence into ids."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Turn ids into a sentence."""
        return self._processor.decode(ids)

    def word_edges(self) -> Edges:
        """Say that a piece with the mark of a blank in front begins a word."""
        pieces = [self._processor.id_to_piece(i) for i in range(self.size)]
        return Edges([piece.startswith(BLANKS) for piece in pieces], [False] * self.size)


class FromOpenClip:
    """The byte-pair encoding of CLIP, as open_clip ships it."""

    def __init__(self, content: str) -> None:
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ImportError as error:
            raise M3Error("this vocabulary needs open_clip; run `pip install 'm3-multimodal[vision]'`.") from error
        if content not in ("", "ViT-B-32"):
            raise M3Error(f"text.vocabulary: open_clip:{content} is not known; write `open_clip:` for CLIP's own.")
        self._tokenizer = SimpleTokenizer()
        self.size = self._tokenizer.vocab_size

    def number(self, token: str) -> int | None:
        """Return the id of a token, e.g. `<start_of_text>`."""
        return self._tokenizer.encoder.get(token)

    def encode(self, text: str) -> list[int]:
        """Turn a sentence into ids."""
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Turn ids into a sentence."""
        return self._tokenizer.decode(ids).strip()

    def word_edges(self) -> Edges:
        """Say that a piece with the mark of an end of word ends one."""
        pieces = [self._tokenizer.decoder[i] for i in range(self.size)]
        return Edges([False] * self.size, [piece.endswith("</w>") for piece in pieces])


_KINDS = {
    "words": Words,
    "tokenizers": FromTokenizers,
    "sentencepiece": FromSentencepiece,
    "open_clip": FromOpenClip,
}


def train_vocabulary(sentences: list[str], size: int, kind: str) -> str:
    """Learn a small vocabulary from a corpus and return the JSON of a `tokenizer.json`.

    Args:
        sentences: the corpus.
        size: largest number of tokens.
        kind: `wordpiece` (as BERT and UNITER) or `bpe` (byte-level, knows every text).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if not any(sentence.strip() for sentence in sentences):
        raise M3Error("the corpus holds no words; give text files with one sentence a line.")
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
        tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[UNKNOWN], show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer.to_str()
