"""LPIPS, CLIP score and FID: notes on what is missing, and values by hand, on tiny networks in caches made for the test.

torchvision and torch-fidelity are not among what the tests need: beside torch for the CPU the registry's torchvision does not
load. A stand-in of small layers takes the place of its AlexNet; all of torchmetrics' LPIPS is the real thing.
"""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from hst_trt.compare.perceptual import CLIP, Fid, Perceptual, perceptual

PROMPTS = ["a cat", "two dogs on a field of grass"]


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of torch and Hugging Face, in folders of these names; no torchvision and no torch-fidelity."""
    pytest.importorskip("torchmetrics", reason='needs pip install "torchmetrics"')
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("torchvision", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 48, 64, 3), np.uint8)


# -- what is missing -----------------------------------------------------------------------------------------------------
def test_without_torchmetrics_one_note_stands_for_all_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    made, notes = perceptual(fid=True)
    assert made == Perceptual()
    assert notes == ('no LPIPS, CLIP score or FID: torchmetrics is not installed; pip install "hst_trt[perceptual]"',)


def test_each_measure_that_lacks_something_has_a_note_with_what_brings_it(caches: Path) -> None:
    made, notes = perceptual(fid=True)
    assert made == Perceptual()
    assert notes == (
        'no LPIPS: torchvision is not installed; pip install "hst_trt[perceptual]"',
        f"no CLIP score: {CLIP} is not in the Hugging Face cache; hf download {CLIP}",
        'no FID: torch_fidelity is not installed; pip install "hst_trt[perceptual]"',
    )
    assert perceptual(fid=False)[1] == notes[:2], "nobody asked for FID"


def test_a_torchvision_of_another_torch_is_a_note_not_a_crash(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    note = perceptual(fid=False)[1][0]
    assert "nms does not exist" in note
    assert note.endswith("install the torchvision made for this torch")


# -- LPIPS ---------------------------------------------------------------------------------------------------------------
URL = "https://weights.invalid/alexnet-owt-0.pth"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts a torchvision in place that has AlexNet's twelve layers, its widths, and 1x1 kernels; weights come from where
    torch's own function finds those of this URL."""
    import torch
    from torch import nn

    def layers() -> nn.Sequential:
        widths, made = (3, 64, 192, 384, 256, 256), list[nn.Module]()
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            made += [nn.MaxPool2d(2)] * (number in (1, 2)) + [nn.Conv2d(before, after, 1), nn.ReLU()]
        return nn.Sequential(*made)

    def alexnet(weights: types.SimpleNamespace) -> types.SimpleNamespace:
        features = layers()
        features.load_state_dict(torch.hub.load_state_dict_from_url(weights.url))
        return types.SimpleNamespace(features=features)

    torchvision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.AlexNet_Weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url=URL))  # type: ignore[attr-defined]
    models.alexnet, torchvision.models = alexnet, models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for module in ("torchmetrics.image.lpip", "torchmetrics.functional.image.lpips"):
        monkeypatch.setattr(f"{module}._TORCHVISION_AVAILABLE", True)
    torch.manual_seed(0)
    return layers()


def test_lpips_is_the_weighted_distance_of_unit_features(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torchmetrics.functional.image as where

    network = stand_in(monkeypatch)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("it downloads"))
    lacking = perceptual(fid=False)[1][0]
    assert lacking.startswith("no LPIPS: torch's cache has no alexnet-owt-0.pth; python -c ")

    (caches / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), caches / "torch" / "hub" / "checkpoints" / "alexnet-owt-0.pth")
    lpips = perceptual(fid=False)[0].lpips
    assert lpips is not None
    a, b = pictures(0), pictures(1)

    heads = torch.load(Path(where.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True)

    def unit_features(x: np.ndarray) -> list[torch.Tensor]:
        y = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
        y = (y - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        made = []
        for layer in network:
            y = layer(y)
            if isinstance(layer, torch.nn.ReLU):
                made.append(y / (y.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return made

    with torch.no_grad():
        parts = [
            ((x - y).square() * heads[f"lin{k}.model.1.weight"]).sum(1).mean((1, 2))
            for k, (x, y) in enumerate(zip(unit_features(a), unit_features(b), strict=True))
        ]
    np.testing.assert_allclose(lpips(a, b), torch.stack(parts).sum(0).numpy(), rtol=1e-4)
    np.testing.assert_allclose(lpips(a[:1], b[:1]), lpips(a, b)[:1], rtol=1e-4)
    assert (lpips(a, a) == 0).all()


# -- CLIP score ----------------------------------------------------------------------------------------------------------
def test_clip_score_is_100_times_the_cosine_of_picture_and_prompt(caches: Path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 8, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config={**width, **text}, vision_config={**width, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(2)
    model = CLIPModel(config).eval()
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=8),
    )
    kept = caches / "hub" / f"models--{CLIP.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0")
    model.save_pretrained(kept / "snapshots" / "0")
    assert "no CLIP score" in perceptual(fid=False)[1][1], "half of it is there"
    processor.save_pretrained(kept / "snapshots" / "0")

    made, notes = perceptual(fid=False)
    assert made.clip is not None
    assert len(notes) == 1
    x = pictures(0)
    by_hand = []
    for picture, prompt in zip(x, PROMPTS, strict=True):  # the second prompt has more tokens than the model takes
        given = processor(text=prompt, images=torch.from_numpy(picture).permute(2, 0, 1), return_tensors="pt", truncation=True)
        with torch.no_grad():
            out = model(**given)
        by_hand.append(100 * torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item())
    assert max(by_hand) > 0
    np.testing.assert_allclose(made.clip(x, PROMPTS), np.maximum(by_hand, 0), rtol=1e-4)


# -- FID -----------------------------------------------------------------------------------------------------------------
def test_fid_of_boxes_is_the_distance_of_middles_and_of_widths() -> None:
    pytest.importorskip("torchmetrics", reason='needs pip install "torchmetrics"')
    corners = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)], np.float32)  # variance 4/3 each, no covariance
    fid = Fid(corners * (2, 3))
    assert fid(corners * (2, 3)) == pytest.approx(0, abs=1e-6)
    assert fid(corners * (4, 3) + (5, 0)) == pytest.approx(5**2 + 4 / 3 * (4 - 2) ** 2)
    assert fid(corners * (2, 3) + (0, 1)) == pytest.approx(1), "what was measured before is forgotten"
