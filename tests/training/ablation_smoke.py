"""One small configuration of the ablation: the same function writes the committed result and recomputes it.

python tests/training/ablation_smoke.py            # writes results/demo/ablation_smoke.json
"""

import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from smfnet.core.provenance import provenance, write_json
from smfnet.data.patches import load_pairs
from smfnet.data.scenes import write_scenes
from smfnet.fusion.files import fuse_folder, load_model
from smfnet.metrics import evaluate_folder
from smfnet.training.ablations import conditions, tidy, train_configuration
from smfnet.training.recipes import recipe

RESULT = Path(__file__).resolve().parents[2] / "results/demo/ablation_smoke.json"
CONFIG, SEED, METRICS = "inn", 0, ("EN", "SD", "VIF", "SSIM", "Qabf")
SETTINGS = {"patch": 32, "stride": 32, "batch": 4, "epochs": [1, 2], "min_contrast": 0.0}
SIZE = (80, 112)  # of the scenes, pixels


def recompute(folder: Path) -> tuple[pd.Series, dict]:
    """Mean of each metric over two test scenes, with the number of steps and the conditions."""
    for i, part in enumerate(("train", "test")):
        write_scenes(folder / part, 2, seed=70 + i, size=SIZE)
    r = recipe("demo", **SETTINGS)
    run = train_configuration(
        CONFIG, load_pairs(folder / "train", progress=False), folder / "run", seed=SEED, r=r, progress=False
    )
    fuse_folder(
        ir=folder / "test",
        vis=folder / "test",
        out=folder / "fused",
        model=load_model(folder / "run/weights.safetensors", device="cpu"),
        progress=False,
    )
    table = evaluate_folder(
        fused=folder / "fused", ir=folder / "test/ir", vis=folder / "test/vi", progress=False
    )
    state = conditions(folder, preset="tiny", r=r, protocol="table1")
    rows = tidy(
        table, config=CONFIG, seed=SEED, set="scenes", protocol="table1", conditions=state, revision=""
    )
    return rows.groupby("metric")["value"].mean()[list(METRICS)], {"steps": run.step, "conditions": state}


def alternative() -> pd.Series:
    """The same with other kernels for most convolutions: what another rounding does to the result."""
    with tempfile.TemporaryDirectory() as folder, torch.backends.mkldnn.flags(enabled=False):
        return recompute(Path(folder))[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        values, made = recompute(Path(folder))
    other = alternative()
    params = {
        "config": CONFIG,
        "settings": SETTINGS,
        "size": list(SIZE),
        "command": "python tests/training/ablation_smoke.py",
    }
    write_json(
        RESULT,
        {
            "values": values.to_dict(),
            "other_kernels": other.to_dict(),
            **made,
            "provenance": provenance(params=params, seed=SEED),
        },
    )
    print(
        pd.DataFrame({"values": values, "other kernels": other, "relative": other / values - 1}),
        file=sys.stderr,
    )
