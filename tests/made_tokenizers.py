"""Tokenizers in the shape of Stable Diffusion 3.5's, trained small: two of CLIP, one of T5 with sentencepiece's compiled rules.

They are loaded from the files that the published pairs have, by the call that the exporter makes, so that each tokenizer.json
has every part that a bundle's has. The variants are the shapes that transformers 4 wrote, and options beside them.
"""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

File = dict[str, Any]  # a tokenizer.json

SCRIPTS = (
    "abcdefghijklmnopqrstuvwxyz", "aeiouéèüñçøåß", "αβγδεζηθικλμνξοπρσς", "абвгдежзийклмнопрст", "אבגדהוזחטיךכל",
    "ابتثجحخدذرزس", "कखगघचछजझटठािीुूे्", "กขคงจฉชซาิีุู่้", "가각간나다라마바사", "あいうえおかきくけこ", "日月火水木金土山川",
    "0123456789", "!?.,:;'-()",
)  # fmt: skip
WORDS = (
    "a", "photo", "of", "the", "red", "cat", "dog", "on", "blue", "sky", "painting", "don't", "we'll", "it's", "style",
    "aaaa", "eeee",
)  # fmt: skip


def corpus(lines: int, seed: int = 0) -> list[str]:
    """Made-up words of many scripts, frequent ones more often, among English ones."""
    chosen = random.Random(seed)
    words = ["".join(chosen.choices(chosen.choice(SCRIPTS), k=chosen.randint(1, 7))) for _ in range(400)]
    return [
        " ".join(chosen.choice(WORDS) if chosen.random() < 0.5 else words[int(400 * chosen.random() ** 2)] for _ in range(12))
        for _ in range(lines)
    ]


def added(content: str, *, normalized: bool = False, strip: bool = False) -> File:
    return {
        "content": content,
        "lstrip": strip,
        "normalized": normalized,
        "rstrip": strip,
        "single_word": False,
        "special": True,
    }


def loaded(folder: Path) -> File:
    """As the exporter does it."""
    from transformers import AutoTokenizer

    return json.loads(AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer.to_str())


def make_clip(folder: Path, *, pad_token: str) -> File:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(corpus(2000), trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *model["vocab"], "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    end = len(vocab) - 1
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n", encoding="utf-8")
    decoder = {str(end - 1): added("<|startoftext|>", normalized=True), str(end): added("<|endoftext|>")}
    if pad_token == "!":
        decoder = {str(vocab["!"]): added("!"), **decoder}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad_token}
    write_config(folder, {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "added_tokens_decoder": decoder, **names})
    return loaded(folder)


def make_t5(folder: Path, *, rules: str, vocab_size: int = 400) -> File:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(1000)), model_writer=model, vocab_size=vocab_size, normalization_rule_name=rules,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    decoder = {str(i): added(token) for i, token in enumerate(("<pad>", "</s>", "<unk>"))}
    decoder |= {str(vocab_size + 99 - i): added(token, strip=True) for i, token in enumerate(extra)}
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": extra}
    write_config(folder, {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "added_tokens_decoder": decoder, **names})
    return loaded(folder)


def write_config(folder: Path, config: File) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def changed(file: File, change: Callable[[File], Any]) -> File:
    file = copy.deepcopy(file)
    change(file)
    return file


# -- what transformers 4 wrote, and options beside it --------------------------------------------------------------------

STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def spaces(content: str) -> File:
    return {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": content}


def clip_variants(file: File) -> Iterable[tuple[str, File]]:
    def older_split(f: File) -> None:
        pattern = f["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
        del f["pre_tokenizer"]["pretokenizers"][1]["use_regex"]

    def older_merges(f: File) -> None:
        f["model"]["merges"] = list(map(" ".join, f["model"]["merges"]))
        for name in ("byte_fallback", "ignore_merges"):
            del f["model"][name]

    def template(f: File) -> None:
        cls, sep = f["post_processor"]["cls"], f["post_processor"]["sep"]
        tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in (cls, sep)}
        single = [
            {"SpecialToken": {"id": cls[0], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": sep[0], "type_id": 0}},
        ]
        f["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}

    def concepts(f: File) -> None:
        tokens = (
            ("<concept>", {}),
            ("Σtyle", {"normalized": True}),
            ("cat", {"single_word": True}),
            ("  ", {"rstrip": True, "lstrip": True}),
            ("x", {"lstrip": True, "single_word": True}),
        )
        f["added_tokens"] += [{"id": 10_000 + i, **added(content), **flags} for i, (content, flags) in enumerate(tokens)]

    yield "the regex of transformers 4", changed(file, older_split)
    yield "merges as lines", changed(file, older_merges)
    yield "a template", changed(file, template)
    yield "concepts", changed(file, concepts)
    yield "no unknown token", changed(file, lambda f: f["model"].update(unk_token=None))


def t5_variants(file: File) -> Iterable[tuple[str, File]]:
    rules = file["normalizer"]

    def variant(normalizer: File | None, pre_tokenizer: File) -> File:
        return changed(file, lambda f: f.update(normalizer=normalizer, pre_tokenizer=pre_tokenizer))

    def sequence(kind: str, *parts: File) -> File:
        return {"type": "Sequence", "normalizers" if kind == "normalizer" else "pretokenizers": list(parts)}

    def metaspace(**fields: Any) -> File:
        return {"type": "Metaspace", "replacement": "▁", **fields}

    split = {"type": "WhitespaceSplit"}
    legacy = sequence("normalizer", rules, STRIP, spaces("▁"))
    yield "transformers 4", variant(legacy, METASPACE)
    yield "transformers 4, not legacy", variant(legacy, metaspace(prepend_scheme="first", split=True))
    yield (
        "older transformers 4",
        variant(
            sequence("normalizer", rules, spaces(" ")), sequence("pre", split, metaspace(str_rep="▁", add_prefix_space=True))
        ),
    )
    yield "no mark in front", variant(rules, metaspace(add_prefix_space=False, prepend_scheme="never", split=True))
    yield "unsplit", variant(legacy, metaspace(prepend_scheme="first", split=False))
    yield "no rules", variant(None, sequence("pre", METASPACE))
