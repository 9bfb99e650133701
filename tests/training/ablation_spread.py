"""How far a row of Table 5 moves when only the order of additions changes: the full configuration, seed 0.

PyTorch and oneDNN choose their kernels by the instructions that a processor has, and each kernel adds in
another order. Environment variables limit the choice, so one machine can stand for several.

python tests/training/ablation_spread.py            # measures; writes results/demo/ablation_spread.json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from smfnet.core.provenance import provenance, write_json
from smfnet.data.patches import load_pairs
from smfnet.data.scenes import write_scenes
from smfnet.fusion.files import fuse_folder
from smfnet.metrics import evaluate_folder
from smfnet.network.model import SMFNet
from smfnet.training.ablations import build, conditions, train_configuration
from smfnet.training.recipes import recipe

RESULT = Path(__file__).resolve().parents[2] / "results/demo/ablation_spread.json"
CONFIG, SEED, SETTINGS = (
    "ours",
    0,
    {"epochs": [1, 2], "stride": 64},
)  # as the stage 'ablation' of the profile full
PARTS = {
    "train": (64, (120, 160)),
    "val": (4, (120, 160)),
    "test": (12, (240, 320)),
}  # as its stage 'prepare'
KERNELS = (
    {},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
)


def write_data(folder: Path) -> None:
    """Render the scenes."""
    for i, (part, (n, size)) in enumerate(PARTS.items()):
        write_scenes(folder / part, n, seed=i, size=size)


def means(model: SMFNet, data: Path, out: Path) -> dict[str, float]:
    """Mean of each metric over the test scenes."""
    fuse_folder(ir=data / "test", vis=data / "test", out=out, model=model, progress=False)
    table = evaluate_folder(
        fused=out, ir=data / "test/ir", vis=data / "test/vi", protocol="table1", progress=False
    )
    return table.mean(numeric_only=True).to_dict()


def recompute(data: Path, folder: Path) -> dict:
    """Train, fuse and measure: conditions, losses of the first steps, means of the metrics."""
    r = recipe("demo", **SETTINGS)
    pairs = load_pairs(data / "train", progress=False)
    run = train_configuration(CONFIG, pairs, folder, seed=SEED, r=r, progress=False)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "conditions": conditions(data, preset="tiny", r=r, protocol="table1"),
        "steps": run.step,
        "losses": [record["loss"] for record in log[:4]],
        "means": means(SMFNet.load(folder / "weights.safetensors"), data, folder / "fused"),
    }


def measure(kernels: dict[str, str], data: Path, folder: Path) -> dict:
    """The same in a process of its own with other kernels."""
    command = [sys.executable, __file__, str(data), str(folder)]
    done = subprocess.run(command, env=os.environ | kernels, stdout=subprocess.PIPE, text=True, check=True)
    return {"kernels": kernels, **json.loads(done.stdout)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        print(json.dumps(recompute(Path(sys.argv[1]), Path(sys.argv[2]))))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_data(data)
        untrained = means(build(CONFIG, seed=SEED)[0].eval(), data, Path(folder, "untrained"))
        rows = [measure(kernels, data, Path(folder, str(i))) for i, kernels in enumerate(KERNELS)]
    made = provenance(params={"config": CONFIG, "settings": SETTINGS}, seed=SEED)
    write_json(RESULT, {"rows": rows, "untrained": untrained, "provenance": made})
