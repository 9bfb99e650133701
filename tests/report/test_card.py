"""Shipped weights of the paper's size are those of their card: two pairs are fused and measured again."""

import json
import os
from pathlib import Path

import pytest
import torch

from smfnet.fusion.files import ready_model
from smfnet.fusion.model_zoo import find_weights
from smfnet.network.model import SMFNet
from smfnet.report.model_card import disproved
from smfnet.report.study import set_folders

ROOT = Path(__file__).resolve().parents[2]
DATA = os.environ.get("SMFNET_DATA", "")
RECORD = json.loads((ROOT / "results/paper.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not DATA, reason="SMFNET_DATA names no folder with the test sets")
def test_two_pairs_are_those_of_the_card():
    proof = RECORD["facts"]["proof"]
    places = [set_folders(name, data=DATA) for name in {entry["set"] for entry in proof}]
    assert len(proof) == 2
    assert disproved("paper", proof, places) == []


def test_the_card_is_the_record():
    card = (ROOT / "smfnet/weights/paper.md").read_text(encoding="utf-8")
    rows = {(r["set"], r["method"], r["metric"]): r["mean"] for r in RECORD["rows"]}
    for name in ("TNO", "RoadScene", "MSRS"):
        assert f"{rows[name, 'ours as saved', 'Qabf']:.4f}" in card
    assert all(f"{s} {text}" in card for s, text in RECORD["facts"]["reached"].items())
    assert find_weights("paper").preset == "paper"


def test_the_weights_fuse_a_pair():
    g = torch.Generator().manual_seed(0)
    vis, ir = torch.rand(2, 1, 1, 48, 64, generator=g)
    model = ready_model("paper", "cpu")
    assert sum(p.numel() for p in SMFNet("paper").parameters()) == 2_650_098
    fused = model.fuse(vis=vis, ir=ir)
    assert fused.shape == vis.shape and 0 <= fused.min() and fused.max() <= 1
    brighter = model.fuse(vis=vis.clamp(min=0.5), ir=ir)
    assert brighter.mean() > fused.mean()
