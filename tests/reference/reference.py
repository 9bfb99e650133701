"""Small numbers that independent implementations computed, for proofs without any file of others.

python tests/reference/reference.py          # compare numbers.json with what would be written
python tests/reference/reference.py --write  # write it; only if a definition has changed on purpose

Networks are computed by bench/literal.py, losses by tests/losses/losses_reference.py, metrics by
tests/metrics/metrics_reference.py: none of them shares code with the package. Weights and images are drawn
from the raw bits of PCG64, which NumPy promises never to change.
"""

import importlib.util
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = Path(__file__).with_name("numbers.json")
NETWORKS = {  # case: preset, size of the literal network, gating
    "paper, as released": ("paper", {}, "channel_interleaved"),
    "paper, equation 15": ("paper", {}, "neighbour"),
    "tiny, equation 15": ("tiny", {"dim": 16, "heads": 4, "groups": 1, "depth": 1}, "neighbour"),
}
SCENES = {"day": 11, "night": 12}  # kind: seed
SAMPLES = 10  # values kept of each intermediate result


def load(path):
    """A Python file that is no module of the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


literal = load(ROOT / "bench" / "literal.py")
plain_losses = load(ROOT / "tests" / "losses" / "losses_reference.py")
plain_metrics = load(ROOT / "tests" / "metrics" / "metrics_reference.py")


class Uniform:
    """Numbers in [0, 1) from the raw bits of PCG64."""

    def __init__(self, seed):
        self.bits = np.random.PCG64(seed)

    def __call__(self, *shape):
        raw = self.bits.random_raw(math.prod(shape) or 1)
        return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def weights(preset):
    """Weights of a network under the release's names, float64, filled in the order of these names."""
    sizes = next(size for name, size, _ in NETWORKS.values() if name == preset)
    model = literal.LiteralSMFNet(**sizes)
    draw, state = Uniform(2407), {}
    shapes = {literal.released_key(k): tuple(v.shape) for k, v in model.state_dict().items()}
    for key, shape in sorted(shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        u = 2 * draw(*shape) - 1
        if key.endswith(("running_mean", "bias")):
            u = 0.1 * u
        elif len(shape) == 4 and math.prod(shape) > 1 and not key.endswith(("scale", "temperature", "gamma")):
            u = u * math.sqrt(3 / math.prod(shape[1:]))
        else:  # scales of all kinds stay near one
            u = 1 + 0.4 * u
        state[key] = torch.from_numpy(np.ascontiguousarray(u))
    return state


def pair(seed=6159, size=(20, 26), batch=2):
    """Two images of different smoothness, float64 in [0, 1)."""
    draw = Uniform(seed)
    coarse = np.kron(draw(batch, 1, size[0] // 2, size[1] // 2), np.ones((2, 2)))
    return {"vis": torch.from_numpy(draw(batch, 1, *size)), "ir": torch.from_numpy(coarse)}


def digest(x):
    """Sum, sum of squares and some values of an array."""
    flat = np.asarray(x, dtype=np.float64).ravel()
    chosen = flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]
    return [float(f"{v:.13g}") for v in (flat.sum(), (flat * flat).sum(), *chosen)]


def network_numbers(case):
    """Digests of every intermediate result of the literal network."""
    preset, size, gating = NETWORKS[case]
    model = literal.LiteralSMFNet(edge_gating=gating, **size).double().load_released(weights(preset))
    return {name: digest(value) for name, value in sorted(model.features(**pair()).items())}


def loss_inputs():
    """Made-up features and images, float64 arrays; the visible images have some black pixels."""
    draw, size = Uniform(17), (2, 1, 20, 26)
    f = {name: draw(*size) for name in ("recon_vis", "recon_ir", "fused")}
    for kind, share in (("base", 0.8), ("detail", 0.3)):
        f[f"ir_{kind}"] = draw(2, 3, 20, 26)
        f[f"vis_{kind}"] = share * f[f"ir_{kind}"] + (1 - share) * draw(2, 3, 20, 26)
    f["graph_ir"], noise = draw(2, 3, 20, 26), draw(2, 3, 20, 26)
    f["graph_vis"] = 0.5 * noise - 0.5 * f["graph_ir"]
    vis, ir = draw(*size), draw(*size)
    vis[..., :3, :4] = 0
    return f, {"vis": vis, "ir": ir}


def loss_numbers(variant):
    """Terms and totals of the plain losses."""
    f, images = loss_inputs()
    found = plain_losses.losses(f, **images, variant=variant)
    return {name: float(f"{value:.13g}") for name, value in sorted(found.items())}


def scene(kind):
    """A rendered pair and two simple fused images, whole numbers 0–255; and a checksum of the pair."""
    from smfnet.data.scenes import render_scene

    drawn = render_scene(SCENES[kind], size=(96, 128), kind=kind)
    vis, ir = (x if x.ndim == 2 else plain_metrics.gray(x) for x in (drawn.vis, drawn.ir))
    vis, ir = vis.astype(np.float32), ir.astype(np.float32)
    fused = {"maximum": np.maximum(vis, ir), "average": np.rint((vis + ir) / 2)}
    check = zlib.crc32(np.stack([vis, ir]).astype(np.uint8).tobytes())
    return vis, ir, fused, check


def metric_numbers(kind):
    """All metrics of the simple fused images of a scene, and the scene's checksum."""
    vis, ir, fused, check = scene(kind)
    values = {
        name: {m: float(f"{v:.13g}") for m, v in plain_metrics.evaluate(image, ir, vis).items()}
        for name, image in fused.items()
    }
    return {"pixels": check, **values}


def numbers():
    """Everything that the file holds."""
    return {
        "network": {case: network_numbers(case) for case in NETWORKS},
        "losses": {variant: loss_numbers(variant) for variant in ("paper", "released")},
        "metrics": {kind: metric_numbers(kind) for kind in SCENES},
    }


def text(found):
    """The file: one line a result."""
    sections = []
    for section, cases in found.items():
        lines = [
            f"  {json.dumps(case)}: {{\n"
            + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
            + "\n  }"
            for case, values in cases.items()
        ]
        sections.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    made = text(numbers())
    if "--write" in sys.argv:
        NUMBERS.write_text(made, encoding="utf-8")
    same = NUMBERS.is_file() and NUMBERS.read_text(encoding="utf-8") == made
    print(f"{NUMBERS.name}: {'as computed' if same else 'differs in its last digits or more'}")
