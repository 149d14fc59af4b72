"""The demo pair's data: scenes repeat from their seed, tokenizers take any text, the shipped directory is whole and small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "hst_trt" / "data" / "demo_pair"
sys.path.insert(0, str(ROOT))  # demo/ is a folder of scripts beside the package, not part of it

from demo.scenes import CAPTION_WORDS, COLOURS, LANDSCAPES, MAX_WORDS, OBJECTS, SIZE, Sprites, draw_scene  # noqa: E402

shipped = pytest.mark.skipif(not PAIR.is_dir(), reason="the demo pair is not in this checkout: make demo-pair")


def test_the_same_seed_draws_the_same_scenes(sprites: Sprites) -> None:
    first, second = (np.random.default_rng(11) for _ in range(2))
    for _ in range(20):
        a, b = draw_scene(first, sprites), draw_scene(second, sprites)
        assert a.caption == b.caption
        assert np.array_equal(a.pixels, b.pixels)


def test_a_caption_names_every_object_in_its_scene_and_only_known_words(sprites: Sprites) -> None:
    rng = np.random.default_rng(2)
    backgrounds = set()
    for _ in range(200):
        scene = draw_scene(rng, sprites)
        words = scene.caption.lower().replace(",", " ,").split()
        assert len(words) <= MAX_WORDS + (len(scene.names) == 3 and scene.background.startswith("gradient"))
        assert set(words) <= {*CAPTION_WORDS, ","}
        assert set(scene.names) == set(words) & {item.name for item in OBJECTS}
        assert scene.pixels.shape == (SIZE, SIZE, 3)
        assert all(0 <= start <= SIZE - p.edge for p in scene.objects for start in (p.left, p.top))
        backgrounds.add(scene.background.split()[0])
    assert backgrounds == {"gradient", *(name.split()[0] for name in (*COLOURS, *LANDSCAPES))}


def test_objects_stand_in_the_order_and_on_the_side_that_the_caption_says(sprites: Sprites) -> None:
    rng = np.random.default_rng(3)
    sides = 0
    for _ in range(300):
        scene = draw_scene(rng, sprites)
        centres = [p.left + p.edge / 2 for p in scene.objects]
        assert centres == sorted(centres)
        words = scene.caption.lower().replace(",", "").split()
        places = {name: words.index(name) for name in scene.names}
        if "on the left" in scene.caption or "on the right" in scene.caption:
            assert (centres[0] < SIZE / 2) == ("on the left" in scene.caption)
            sides += 1
        elif len(scene.names) == 2:
            reversed_order = "to the right of" in scene.caption
            assert (places[scene.names[0]] > places[scene.names[1]]) == reversed_order
    assert sides > 20


def test_missing_sprites_say_which(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks the sprites of 40 of 40 objects \(first: 1f34e.webp\)"):
        Sprites(tmp_path)


def test_every_caption_word_is_one_token() -> None:
    text = pytest.importorskip("demo.text", reason="needs transformers")
    clip, t5 = text.make_clip_tokenizer(), text.make_t5_tokenizer()
    for word in CAPTION_WORDS:
        assert clip.tokenize(word) == [f"{word}</w>"]
        assert t5.tokenize(word) == [f"▁{word}"]


def test_the_end_token_has_the_highest_id_so_that_clip_pools_at_it() -> None:
    text = pytest.importorskip("demo.text", reason="needs transformers")
    tokenizer = text.make_clip_tokenizer()
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())


@shipped
@pytest.mark.parametrize(
    "prompt", ["", "An apple, 3 dogs!", "naïve Ünïcode", "漢字 かな", "🦊\U0001f9ff", "\x00\x07\t\n", "\ufffd\u202e"]
)
def test_any_prompt_becomes_tokens_in_all_three_shipped_tokenizers(prompt: str) -> None:
    transformers = pytest.importorskip("transformers")
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(PAIR / folder)
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length == 16
        assert tokenizer.eos_token_id in ids
        if folder == "tokenizer":  # byte-level: nothing is lost but case and white space (tokenizer_2 pads with "!")
            decoded = tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True)
            assert "".join(decoded.split()) == "".join(prompt.lower().split())


@shipped
def test_the_shipped_directory_is_within_25_mb_and_carries_its_licence() -> None:
    assert sum(file.stat().st_size for file in PAIR.rglob("*") if file.is_file()) <= 25_000_000
    notice = (PAIR / "LICENSE.md").read_text(encoding="utf-8")
    assert "MIT License" in notice
    assert "LobeHub" in notice
    assert "@lobehub/fluent-emoji-3d" in (PAIR / "MODEL_CARD.md").read_text(encoding="utf-8")


@shipped
def test_the_shipped_directory_is_a_stable_diffusion_3_pipeline_with_a_second_transformer() -> None:
    index = json.loads((PAIR / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert {"transformer", "vae", "text_encoder_3", "tokenizer_3", "scheduler"} <= parts
    assert all((PAIR / part).is_dir() for part in parts)
    large, small = (
        json.loads((PAIR / folder / "config.json").read_text(encoding="utf-8"))
        for folder in ("transformer", "transformer_small")
    )
    shared = (
        "in_channels",
        "out_channels",
        "patch_size",
        "sample_size",
        "joint_attention_dim",
        "pooled_projection_dim",
    )
    assert {key: large[key] for key in shared} == {key: small[key] for key in shared}
    assert small["dual_attention_layers"]


@shipped
def test_no_config_in_the_shipped_directory_names_a_path_of_the_machine_it_was_made_on() -> None:
    for config in PAIR.rglob("*.json"):
        if config.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(config.read_text(encoding="utf-8"))
