"""The package meets numbers that independent implementations computed: proofs without any file of others."""

import json
import sys

import numpy as np
import pytest
import torch
from rooms import ROOT
from safetensors.torch import load_file

from smfnet.core.checks import golden_file
from smfnet.losses.semantic import semantic_loss
from smfnet.losses.stages import LossWeights, stage1_loss, stage2_loss
from smfnet.metrics import evaluate
from smfnet.network.model import SMFNet
from smfnet.network.released import released_name

sys.path.insert(0, str(ROOT / "tests" / "reference"))
import reference

KEPT = json.loads(reference.NUMBERS.read_text(encoding="utf-8"))
DIGITS = 1e-9  # of the largest value; float64 leaves 1e-13 here, and other kernels add in another order
STEPS = 1e-6  # relative; the steps of the Lovász extension are float32
NORM = 1e-6  # absolute; the package rounds the kink of the norm in equation 20 by this much


def model_of(case):
    """The package's network of a case, in float64 with the weights of the file."""
    preset, _, gating = reference.NETWORKS[case]
    model = SMFNet(preset, edge_gating=gating).double().eval()
    model.load_state_dict({released_name(k): v for k, v in reference.weights(preset).items()})
    return model


def distance(found, kept):
    """Largest difference of two digests, each entry relative to what it can be at most."""
    most = np.sqrt(kept[1] * found.numel())  # a sum of values with this sum of squares is no larger
    scales = [most, kept[1], *[max(map(abs, kept[2:]))] * (len(kept) - 2)]
    return (np.abs(np.array(reference.digest(found)) - kept) / scales).max()


def features_of(model):
    """Every intermediate result, without the sources."""
    with torch.no_grad():
        found = model.features(**reference.pair())
    return {name: value for name, value in found.items() if name not in ("vis", "ir")}


@pytest.mark.parametrize("case", reference.NETWORKS)
def test_network_meets_the_reference_numbers(case):
    """Every intermediate result of both stages, both gatings, both sizes."""
    found = features_of(model_of(case))
    assert set(found) == set(KEPT["network"][case])
    errors = {name: distance(value, KEPT["network"][case][name]) for name, value in found.items()}
    assert max(errors.values()) < DIGITS, errors


def test_one_altered_weight_is_noticed():
    """One weight of 2.6 million, changed by a thousandth, shows in every result behind it."""
    case = "paper, equation 15"
    model = model_of(case)
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[0] += 1e-3
    kept = KEPT["network"][case]
    errors = {name: distance(value, kept[name]) for name, value in features_of(model).items()}
    assert min(errors.values()) > 100 * DIGITS, errors


def test_the_gatings_differ():
    """The two paper-size cases have the same weights and part at the graph, not before."""
    one, two = (KEPT["network"][f"paper, {name}"] for name in ("as released", "equation 15"))
    behind = {"graph_ir", "graph_vis", "graph_fused", "fused", "recon_ir", "recon_vis"}
    assert {name for name in one if one[name] != two[name]} == behind


def our_losses(variant):
    """The package's terms and totals, by the names of the file."""
    f, images = ({k: torch.from_numpy(v) for k, v in part.items()} for part in reference.loss_inputs())
    weights = LossWeights.preset("released" if variant == "released" else "paper")
    total1, one = stage1_loss(f, **images, variant=variant, weights=weights)
    total2, two = stage2_loss(f, **images, variant=variant, weights=weights)
    found = {**two, **one, "stage1": total1, "stage2": total2}
    found |= {"decomposition1": one["decomposition"], "decomposition2": two["decomposition"]}
    del found["decomposition"]
    if variant == "paper":
        found["foreground_vis"] = semantic_loss(f["recon_vis"], images["vis"], reading="foreground")
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_losses_meet_the_reference_numbers(variant):
    """Every term, correlation and total of both stages."""
    found, kept = our_losses(variant), KEPT["losses"][variant]
    assert set(found) == set(kept)
    rounded = {"semantic_vis": STEPS, "foreground_vis": STEPS, "stage1": STEPS}
    rounded |= {"intensity_ir": NORM} if variant == "paper" else {}
    for name, value in found.items():
        assert value == pytest.approx(kept[name], rel=rounded.get(name, DIGITS), abs=rounded.get(name, 0)), (
            name
        )


@pytest.mark.parametrize("kind", reference.SCENES)
def test_metrics_meet_the_reference_numbers(kind):
    """Nine metrics of two simple fusions of a rendered scene, and the two variants in their conventions."""
    kept = KEPT["metrics"][kind]
    vis, ir, fused, check = reference.scene(kind)
    assert check == kept["pixels"], "the renderer draws another scene; nothing is said about the metrics"
    for name, image in fused.items():
        found = evaluate(fused=image, ir=ir, vis=vis)
        found["AG_half"] = evaluate(fused=image, ir=ir, vis=vis, protocol="ag_half")["AG"]
        found["SSIM_range255"] = evaluate(fused=image, ir=ir, vis=vis, protocol="ssim_range255")["SSIM"]
        assert found == pytest.approx(kept[name], rel=1e-6), name  # single pixels of Qabf and AG are float32


def close(found, kept):
    """Whether two nested results agree in 9 digits."""
    if isinstance(kept, dict):
        return set(found) == set(kept) and all(close(found[k], v) for k, v in kept.items())
    return np.allclose(found, kept, rtol=DIGITS, atol=DIGITS * np.abs(kept).max())


@pytest.mark.parametrize("section", ["network", "losses", "metrics"])
def test_the_file_holds_what_the_independent_versions_say(section):
    """Nobody typed the numbers, and none of them came from the package."""
    made = {"network": reference.NETWORKS, "losses": ("paper", "released"), "metrics": reference.SCENES}[
        section
    ]
    compute = getattr(
        reference, {"losses": "loss_numbers"}.get(section, section.removesuffix("s") + "_numbers")
    )
    assert close({case: compute(case) for case in made}, KEPT[section])


def test_the_independent_losses_meet_the_authors_values():
    """So the plain version is anchored too, where the authors' values are at hand."""
    values, tensors = (
        golden_file("released_losses_seed7.json"),
        golden_file("released_activations_seed7.safetensors"),
    )
    if not (values and tensors):
        pytest.skip("SMFNET_GOLDEN does not lead to the authors' values")
    golden = json.loads(values.read_text())
    a = {k: v.double().numpy() for k, v in load_file(tensors).items()}
    found = reference.plain_losses.losses(a, vis=a["vis"], ir=a["ir"], variant="released")
    names = {
        "sobel_l1_vis": "sobel_vis",
        "sobel_l1_ir": "sobel_ir",
        "spatial_gradient_l1_vis": "spatial_gradient_vis",
        "gram_mse_ir": "intensity_ir",
        "dssim_vis": "ssim_vis",
        "dssim_ir": "ssim_ir",
        "cc_base": "cc_base",
        "cc_detail": "cc_detail",
        "cc_graph": "cc_graph",
        "stage2_intensity": "intensity",
        "stage2_gradient": "gradient",
    }
    for theirs, ours in names.items():  # theirs are float32; a mean of squares keeps fewer digits
        assert found[ours] == pytest.approx(golden[theirs], rel=2e-5), theirs
    total = found["intensity"] + 10 * found["gradient"]
    assert total == pytest.approx(golden["stage2_total_without_decomposition"], rel=1e-5)


def test_the_file_is_small():
    """A few kilobytes, so that it can be read and reviewed."""
    assert reference.NUMBERS.stat().st_size < 20_000
