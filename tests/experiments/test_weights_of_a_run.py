"""`make reproduce DATA=DIR WEIGHTS=released`: from a checkpoint of the authors' kind to verdicts."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("papermill")
pytest.importorskip("pydantic")

from reproduce import Plan, methods_of

from smfnet.core.checks import InputError
from smfnet.core.download import git_blob
from smfnet.fusion.model_zoo import as_entry, find_weights

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = ("DIDF_Encoder", "DIDF_Decoder", "BaseFuseLayer", "DetailFuseLayer", "GraphModel")
PAIRS = {"TNO": 25, "RoadScene": 50}  # as many as the public test splits have
SPEC = importlib.util.spec_from_file_location("literal", ROOT / "bench/literal.py")
literal = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(literal)
needs_snakemake = pytest.mark.skipif(sys.version_info < (3, 11), reason="Snakemake needs Python 3.11")


def authors_checkpoint(path: Path) -> Path:
    """Random weights as the authors save theirs."""
    torch.manual_seed(0)
    flat = {literal.released_key(k): v for k, v in literal.LiteralSMFNet().state_dict().items()}
    parts = {e: {k.split("/", 1)[1]: v for k, v in flat.items() if k.split("/")[0] == e} for e in ENTRIES}
    torch.save(parts, path)
    return path


@pytest.fixture
def project(tmp_path):
    """The notebooks, kept results and published values of this project, in a folder of their own."""
    place = tmp_path / "project"
    for name in ("nbs/experiments", "data/published", "results/full"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns(".snakemake", "__pycache__"))
    (place / "smfnet").symlink_to(ROOT / "smfnet")
    return place


@pytest.fixture
def sets(tmp_path):
    """Sets of the right numbers of small pairs, with images of another method for one of them."""
    rng, root = np.random.default_rng(0), tmp_path / "sets"
    for name, count in PAIRS.items():
        for side in ("ir", "vi"):
            (root / name / "test" / side).mkdir(parents=True)
        for i in range(count):
            coarse = rng.uniform(0, 255, (2, 8, 8))
            for side, values in zip(("ir", "vi"), coarse, strict=True):
                picture = Image.fromarray(values.astype(np.uint8)).resize((64, 64), Image.BICUBIC)
                picture.save(root / name / "test" / side / f"{i:02}.png")
    shutil.copytree(root / "TNO/test/vi", root / "fused/TNO/DIDFuse")
    return root


def run(project: Path, sets: Path, weights: str) -> subprocess.CompletedProcess:
    """The stages behind Table 1 and the claims."""
    command = [
        "nbs/experiments/reproduce.py",
        "--cores=1",
        "--profile=real",
        f"--data={sets}",
        f"--weights={weights}",
    ]
    return subprocess.run(
        [sys.executable, *command, "--", "table1", "claims"], cwd=project, capture_output=True, text=True
    )


@needs_snakemake
def test_random_weights_of_the_authors_kind_are_not_reproduced(project, sets, tmp_path):
    """They are fetched by name, saved as the release saves, and refute; the report says whose they are."""
    refused = run(project, sets, "released")
    assert refused.returncode == 2 and "run: smfnet weights get released" in refused.stderr
    path = authors_checkpoint(tmp_path / "model.pth")
    w = find_weights("released")
    entry = as_entry(replace(w, file=replace(w.file, blob=git_blob(path))))
    own = project / "data/weights"
    own.mkdir()
    (own / "weights.json").write_text(json.dumps({"format": 1, "weights": {"released": entry}}))
    shutil.copy(path, own / w.file.path)
    done = run(project, sets, "released")
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(project / "runs/real/table1/table1.csv")
    notes = table.dropna(subset=["measured"]).groupby("method")["note"].first()
    assert notes["ours"] == "authors' weights, as the release saves"
    assert notes["ours as fused"] == "authors' weights, as fused"
    claims = pd.read_csv(project / "runs/real/claims/claims.csv")
    theirs = claims[claims["layer"] == "authors' weights"].set_index("id")
    assert (theirs.loc[["3.2-e", "3.2-h", "3.2-l"], "verdict"] == "not reproduced").all()
    assert "reproduced" not in set(theirs["verdict"])
    assert set(claims.loc[claims["layer"] == "stand-ins", "verdict"]) <= {"not tested", "open"}
    others = claims[(claims["layer"] == "other methods' images") & (claims["id"] == "3.2-j")].iloc[0]
    assert "1 of 9 rivals on TNO" in others["why"]
    head = (project / "runs/real/claims/headline.html").read_text()
    assert "not of the package" in head  # the entry was replaced
    assert "DIDFuse" in (project / "runs/real/table1/met.csv").read_text()


@needs_snakemake
def test_unknown_weights_are_refused_before_anything_runs(project, sets, tmp_path):
    """A misspelt name, a file that is not there."""
    for weights, words in (("relesed", "relesed"), (str(tmp_path / "none.pth"), "no such weights file")):
        refused = run(project, sets, weights)
        assert refused.returncode == 2 and words in refused.stderr and not (project / "runs").exists()


@pytest.mark.parametrize("taken", ["ours", "average", "DIDFuse", "smfnet", "ours as saved", ".hidden"])
def test_a_second_network_has_a_name_of_its_own(tmp_path, taken):
    """Its rows would be those of another method."""
    file = tmp_path / f"{taken}.safetensors"
    file.write_bytes(b"weights")
    with pytest.raises(InputError, match="is taken; rename the file"):
        methods_of({"tiny": "x", str(file): "y"}, ROOT / "data/published")
    assert methods_of({str(file): "y"}, ROOT / "data/published") == {"ours": str(file)}


def test_networks_are_called_by_their_files(tmp_path):
    """The first is ours, whatever its name; equal names are refused."""
    table = ROOT / "data/published"
    assert methods_of({"tiny": "", "a/x.pth": "", "released": ""}, table) == {
        "ours": "tiny",
        "x": "a/x.pth",
        "released": "released",
    }
    with pytest.raises(InputError, match="b/x.pth"):
        methods_of({"tiny": "", "a/x.pth": "", "b/x.pth": ""}, table)


def test_named_weights_replace_what_a_profile_says_of_ours(monkeypatch):
    """Whose network it is, is read from the weights; stages that only share a word do not depend on them."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "nbs/experiments/config/demo.yaml").read_text()) | {"WEIGHTS": ["tiny"]}
    plan = Plan(config, {})
    assert plan.config["fuse"]["weights"] == "tiny" and "notes" not in plan.config["table1"]
    assert "smfnet/weights/tiny.safetensors" in plan.inputs({"weights": "tiny"})[0]
    assert plan.inputs({"preset": "tiny"})[0] == []
