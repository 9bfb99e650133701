"""Losses of both training stages: values worked by hand, golden values, gradients, bad input."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from smfnet.core.checks import InputError
from smfnet.losses.decomposition import cc, decomposition_stage1, decomposition_stage2
from smfnet.losses.intensity import gram, gram_distance, gram_mse, intensity_loss
from smfnet.losses.reconstruction import dssim, sobel, sobel_l1, spatial_gradient_l1, ssim_map
from smfnet.losses.semantic import (
    READINGS,
    class_errors,
    foreground_threshold,
    jaccard_distance,
    jaccard_steps,
    lovasz,
    lovasz_softmax,
    ordered_labels,
    ordered_scores,
    semantic_loss,
)
from smfnet.losses.stages import (
    ABLATIONS,
    WEIGHTS,
    LossWeights,
    Stage1Loss,
    Stage2Loss,
    fusion_gradient,
    fusion_intensity,
    reconstruction_ir,
    reconstruction_vis,
    stage1_loss,
    stage2_loss,
)


def rand(*shape, seed, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


U = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
V = torch.tensor([1.0, 3, 2, 4]).view(1, 1, 2, 2)  # CC(U, V) = 0.8


def make_features(batch=2, side=16, seed=0):
    "Random features and a random pair; channels of the features: 3."
    names = ("ir_base", "vis_base", "ir_detail", "vis_detail", "graph_ir", "graph_vis")
    f = {n: rand(batch, 3, side, side, seed=seed + i) for i, n in enumerate(names)}
    f.update(
        {
            n: rand(batch, 1, side, side, seed=seed + 10 + i)
            for i, n in enumerate(("recon_vis", "recon_ir", "fused"))
        }
    )
    return f, {
        "vis": rand(batch, 1, side, side, seed=seed + 20),
        "ir": rand(batch, 1, side, side, seed=seed + 21),
    }


# Equations by hand


def test_eq18_19_structure():
    a, b = torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), 0.25)
    expected = 1 - (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    assert_close(dssim(a, b), torch.tensor(expected), atol=1e-3, rtol=0)  # float32 cancellation / c2
    assert_close(dssim(a, b, variant="released"), torch.tensor(expected / 2), atol=1e-3, rtol=0)
    x, y = rand(2, 1, 13, 17, seed=0), rand(2, 1, 13, 17, seed=1)
    assert ssim_map(x, y).shape == x.shape
    assert_close(dssim(x, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert dssim(x, y) > 0.5


def test_ssim_needs_no_torchvision(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it would now fail
    x = rand(1, 1, 8, 8, seed=0)
    assert_close(dssim(x, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    spatial_gradient_l1(x, x)


def test_eq18_19_edges():
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1
    assert_close(sobel(step)[0, 0, 1], torch.tensor([0.0, 0, 4, 4, 0, 4]), atol=0, rtol=0)
    corner = sobel(torch.ones(1, 1, 5, 5))[0, 0]
    assert corner[0, 0] == 6 and corner[0, 2] == 4 and corner[2, 2] == 0
    assert_close(sobel_l1(step, step * 0), sobel(step).mean(), atol=0, rtol=0)
    two = torch.cat([step, 2 * step], 1)
    assert_close(sobel(two)[:, 1:], 2 * sobel(step), atol=0, rtol=0)  # channels stay apart


def test_eq17_outer_gradient():
    ramp = (torch.arange(6) * 0.1).expand(1, 1, 5, 6)
    assert_close(spatial_gradient_l1(ramp, ramp * 0), torch.tensor(0.1 * 5 / 6 / 2), atol=1e-7, rtol=0)
    assert_close(spatial_gradient_l1(ramp, ramp + 0.2), torch.tensor(0.0), atol=1e-7, rtol=0)


def test_eq20_gram():
    tiny = torch.tensor([[1.0, 2], [3, 0]])[None, :, None]
    assert_close(gram(tiny)[0], torch.tensor([[5.0, 3], [3, 9]]) / 4, atol=0, rtol=0)
    a, b = torch.full((3, 1, 4, 5), 0.5), torch.full((3, 1, 4, 5), 0.25)
    assert_close(gram_distance(a, b), torch.tensor(0.1875), atol=2e-6, rtol=0)  # eps of the rounded norm
    assert_close(gram_mse(a, b), torch.tensor(0.1875**2))
    x = rand(1, 1, 8, 9, seed=0)
    mixed = x.flatten()[torch.randperm(72, generator=torch.Generator().manual_seed(1))].view_as(x)
    assert intensity_loss(mixed, x) < 1e-6 < 1e-4 < intensity_loss(mixed, x, neighbourhood=3)


def test_eq21_jaccard():
    p, t = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([0, 1, 1, 1, 0])
    assert jaccard_distance(p, t) == 0.5 and jaccard_distance(t, t) == 0 and jaccard_distance(1 - t, t) == 1


def test_eq22_errors():
    got = class_errors(torch.tensor([0.9, 0.6, 0.3, 0.2]), torch.tensor([True, False, True, False]))
    assert_close(got, torch.tensor([0.1, 0.6, 0.7, 0.2]))


def test_eq24_25_steps():
    assert_close(
        jaccard_steps(torch.tensor([True, False, False, True])), torch.tensor([1 / 2, 1 / 6, 1 / 12, 1 / 4])
    )
    for seed in range(5):
        steps = jaccard_steps(rand(3, 20, seed=seed) > 0.6)
        assert (steps >= 0).all()
        assert_close(steps.sum(-1), torch.ones(3))


def test_eq23_extension():
    "Against the Jaccard distance of hard predictions, and against a mean over cuts with Python sets."
    for p in itertools.product((0.0, 1.0), repeat=4):
        for t in itertools.product((False, True), repeat=4):
            p_, t_ = torch.tensor(p), torch.tensor(t)
            if t_.any():
                assert_close(lovasz(class_errors(p_, t_), t_), jaccard_distance(p_, t_))
    for seed in range(20):
        e, t = rand(6, seed=seed), rand(6, seed=seed + 100) > 0.4
        members, total, low = {i for i in range(6) if t[i]}, 0.0, 0.0
        for high in sorted(e.tolist()):
            predicted = members ^ {i for i in range(6) if float(e[i]) >= high}
            total += (
                (high - low) * (1 - len(predicted & members) / len(predicted | members))
                if members
                else high - low
            )
            low = high
        expected = total if members else float(e.max())
        assert abs(float(lovasz(e, t)) - expected) < 1e-6  # float32


def test_lovasz_softmax_averages_present_classes():
    score = rand(2, 3, 4, 5, seed=0).softmax(1)
    labels = (rand(2, 4, 5, seed=1) * 2).long()  # class 2 never occurs
    per_image = []
    for b in range(2):
        per_class = []
        for c in labels[b].unique():
            truth = (labels[b] == c).flatten()
            per_class.append(lovasz(class_errors(score[b, c].flatten(), truth), truth))
        per_image.append(torch.stack(per_class).mean())
    assert_close(lovasz_softmax(score, labels), torch.stack(per_image).mean())
    whole = lovasz_softmax(score.transpose(0, 1).flatten(1).view(1, 3, 8, 5), labels.view(1, 8, 5))
    assert_close(lovasz_softmax(score, labels, per_image=False), whole)
    assert lovasz_softmax(score, labels * 0 - 1) == 0


def test_readings_by_hand():
    grey = torch.tensor([0.0, 0.1, 0.49, 0.5, 1.0]).view(1, 1, 1, 5)
    assert ordered_labels(grey, 4).flatten().tolist() == [0, 0, 1, 2, 3]
    assert_close(ordered_scores(grey, 4, 0.5).sum(1), torch.ones(1, 1, 5))
    lamp = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9]).view(1, 1, 1, 5)
    assert_close(foreground_threshold(lamp).flatten(), torch.tensor([0.44826]))
    src, rec = (torch.tensor(t).view(1, 1, 2, 2) for t in ([0.2, 0.2, 0.8, 0.8], [0.2, 0.8, 0.8, 0.8]))
    assert_close(semantic_loss(rec, src, classes=2, softness=0.05), torch.tensor((1 / 2 + 1 / 3) / 2))


@pytest.mark.parametrize("reading", READINGS)
def test_semantic_is_independent_of_the_batch_and_trains(reading):
    x, r = rand(3, 1, 16, 16, seed=0), rand(3, 1, 16, 16, seed=1).requires_grad_()
    whole = semantic_loss(r, x, reading=reading)
    parts = [semantic_loss(r[i : i + 1], x[i : i + 1], reading=reading) for i in range(3)]
    assert_close(whole, torch.stack(parts).mean())
    whole.backward()
    assert torch.isfinite(r.grad).all() and all(g.any() for g in r.grad)
    one_step = semantic_loss(r.detach() - 0.02 * r.grad.sign(), x, reading=reading)
    assert one_step < whole


def test_released_semantic_is_constant():
    x = rand(2, 1, 12, 12, seed=0)
    x[..., :3, :3] = 0
    for seed in range(3):
        r = rand(2, 1, 12, 12, seed=seed).requires_grad_()
        value = semantic_loss(r, x, variant="released")
        value.backward()
        assert_close(value.detach(), torch.tensor(1 - 9 / 144))
        assert torch.count_nonzero(r.grad) == 0


def test_correlation():
    assert_close(cc(U, V), torch.tensor([0.8]))
    a, b = rand(3, 4, 5, 6, seed=0), rand(3, 4, 5, 6, seed=1)
    for k in range(3):
        np.testing.assert_allclose(cc(a, b)[k], np.corrcoef(a[k].ravel(), b[k].ravel())[0, 1], atol=1e-6)
    per_channel = [np.corrcoef(a[0, c].ravel(), b[0, c].ravel())[0, 1] for c in range(4)]
    np.testing.assert_allclose(cc(a, b, per="channel")[0], np.mean(per_channel), atol=1e-6)
    whole = cc(a.requires_grad_(), b, variant="released")
    np.testing.assert_allclose(whole, np.corrcoef(a.detach().ravel(), b.ravel())[0, 1], atol=1e-6)
    assert not whole.requires_grad and cc(a, b).requires_grad
    assert cc(torch.full_like(b, 0.3), b).abs().max() < 1e-4


def hand_features():
    return dict(ir_base=U, vis_base=U, ir_detail=U, vis_detail=V, graph_ir=V, graph_vis=V)


def test_eq26_stage1():
    assert_close(decomposition_stage1(hand_features())[0], torch.tensor(0.64 / 2.01))
    assert_close(decomposition_stage1(hand_features(), graph_weight=1.0)[0], torch.tensor(1.64 / 2.01))
    assert_close(decomposition_stage1(hand_features(), delta=2.0)[0], torch.tensor(0.64 / 3))


def test_eq27_stage2():
    assert_close(decomposition_stage2(hand_features())[0], torch.tensor(1.64 / 2.01))
    assert_close(decomposition_stage2(hand_features(), graph_weight=0.0)[0], torch.tensor(0.64 / 2.01))
    assert_close(
        decomposition_stage2(hand_features(), variant="released")[0], torch.tensor(1.28 / 2.01)
    )  # detail twice


def test_eq18_reconstruction_vis():
    x, y = rand(1, 1, 16, 16, seed=0), rand(1, 1, 16, 16, seed=1)
    table = reconstruction_vis(y, x, LossWeights(), "paper", "foreground")
    got = {k: (w, float(f())) for k, (w, f) in table.items()}
    expected = {
        "ssim_vis": (8, float(dssim(y, x))),
        "semantic_vis": (1, float(semantic_loss(y, x, reading="foreground"))),
        "sobel_vis": (10, float(sobel_l1(y, x))),
    }
    assert got == expected


def test_eq19_reconstruction_ir():
    x, y = rand(1, 1, 16, 16, seed=0), rand(1, 1, 16, 16, seed=1)
    got = {k: (w, float(f())) for k, (w, f) in reconstruction_ir(y, x, LossWeights(), "released").items()}
    expected = {
        "ssim_ir": (8, float(dssim(y, x, variant="released"))),
        "intensity_ir": (1, float(gram_mse(y, x))),
        "sobel_ir": (10, float(sobel_l1(y, x))),
    }
    assert got == expected


def test_eq17_total():
    f, pair = make_features()
    total, t = stage1_loss(f, **pair)
    parts = [
        8 * t["ssim_vis"],
        t["semantic_vis"],
        10 * t["sobel_vis"],
        8 * t["ssim_ir"],
        t["intensity_ir"],
        10 * t["sobel_ir"],
        2 * t["decomposition"],
        5 * t["spatial_gradient_vis"],
    ]
    assert_close(total, torch.stack(parts).sum())
    assert "spatial_gradient_ir" not in t
    both, t2 = stage1_loss(f, **pair, weights=LossWeights(alpha2_ir=5))
    assert_close(t2["spatial_gradient_ir"], spatial_gradient_l1(f["recon_ir"], pair["ir"]))
    assert_close(t2["spatial_gradient_vis"], spatial_gradient_l1(f["recon_vis"], pair["vis"]))
    assert_close(
        both - total, 5 * t2["spatial_gradient_ir"], atol=1e-5, rtol=0
    )  # difference of two float32 totals


def test_eq28_total():
    f, pair = make_features()
    total, t = stage2_loss(f, **pair)
    assert_close(total, t["intensity"] + 2 * t["decomposition"] + 10 * t["gradient"])
    total, t = stage2_loss(f, **pair, weights=LossWeights.preset("printed"))
    assert_close(total, t["intensity"] + 10 * t["decomposition"] + 2 * t["gradient"])


def test_eq29_intensity():
    step, grey = (torch.arange(6) >= 3).float().expand(1, 1, 4, 6), torch.full((1, 1, 4, 6), 0.5)
    assert fusion_intensity(torch.maximum(step, grey), vis=step, ir=grey) == 0
    assert_close(fusion_intensity(grey, vis=step, ir=grey), torch.tensor(0.25), atol=0, rtol=0)


def test_eq30_gradient():
    step, grey = (torch.arange(6) >= 3).float().expand(1, 1, 4, 6), torch.full((1, 1, 4, 6), 0.5)
    assert fusion_gradient(step, vis=step, ir=step * 0.3) == 0
    target = torch.maximum(sobel(step), sobel(grey))
    assert_close(fusion_gradient(grey * 0, vis=step, ir=grey), target.mean(), atol=0, rtol=0)
    assert_close(
        fusion_gradient(grey, vis=step, ir=grey), fusion_gradient(grey, vis=grey, ir=step), atol=0, rtol=0
    )


# Switches


def test_ablations_and_presets():
    f, pair = make_features()
    assert set(WEIGHTS) == {"paper", "printed", "released"} and LossWeights.preset("paper") == LossWeights()
    for name, override in ABLATIONS.items():
        w = LossWeights.preset("paper", **override)
        _, one = stage1_loss(f, **pair, weights=w)
        _, two = stage2_loss(f, **pair, weights=w)
        assert (
            ("semantic_vis" in one) == ("intensity_ir" in one) == (name != "without_intensity_and_semantic")
        )
        assert ("cc_graph" in one) == (name == "both_cc_graph")
        expected = decomposition_stage2(f, graph_weight=0.0 if name == "without_graph_cc" else 1.0)[0]
        assert_close(two["decomposition"], expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.alpha1 = 3


def test_stage_records_equal_functions():
    f, pair = make_features()
    w = LossWeights(alpha1=3, alpha4=4)
    assert_close(
        Stage1Loss(w, "released")(f, **pair)[0],
        stage1_loss(f, **pair, weights=w, variant="released")[0],
        atol=0,
        rtol=0,
    )
    assert_close(
        Stage1Loss(reading="foreground")(f, **pair)[0],
        stage1_loss(f, **pair, reading="foreground")[0],
        atol=0,
        rtol=0,
    )
    assert_close(Stage2Loss(w)(f, **pair)[0], stage2_loss(f, **pair, weights=w)[0], atol=0, rtol=0)


# Gradients


@pytest.mark.parametrize("stage", [stage1_loss, stage2_loss])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_which_features_receive_gradients(stage, variant):
    f, pair = make_features()
    f = {k: v.requires_grad_() for k, v in f.items()}
    total, terms = stage(f, **pair, variant=variant)
    assert total.requires_grad and not any(t.requires_grad or t.ndim for t in terms.values())
    total.backward()
    images = {"recon_vis", "recon_ir"} if stage is stage1_loss else {"fused"}
    private = {"ir_base", "vis_base", "ir_detail", "vis_detail"} | (
        set() if stage is stage1_loss else {"graph_ir", "graph_vis"}
    )
    expected = images | (private if variant == "paper" else set())
    reached = {k for k, v in f.items() if v.grad is not None and v.grad.any()}
    assert reached == expected
    assert all(torch.isfinite(f[k].grad).all() for k in reached)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_constant_images_and_features_stay_finite(level, variant):
    f, _ = make_features()
    f = {k: torch.full_like(v, level).requires_grad_() for k, v in f.items()}
    pair = {k: torch.full((2, 1, 16, 16), level) for k in ("vis", "ir")}
    total = stage1_loss(f, **pair, variant=variant)[0] + stage2_loss(f, **pair, variant=variant)[0]
    total.backward()
    assert torch.isfinite(total) and all(
        torch.isfinite(v.grad).all() for v in f.values() if v.grad is not None
    )


def test_gradients_against_finite_differences():
    x = rand(2, 1, 7, 6, seed=0, dtype=torch.float64)
    r = rand(2, 1, 7, 6, seed=1, dtype=torch.float64).requires_grad_()
    terms = [
        lambda r: dssim(r, x),
        lambda r: sobel_l1(r, x),
        lambda r: spatial_gradient_l1(r, x),
        lambda r: intensity_loss(r, x, neighbourhood=3),
        lambda r: intensity_loss(r, x, variant="released"),
        lambda r: semantic_loss(r, x),
        lambda r: semantic_loss(r, x, reading="foreground"),
        lambda r: fusion_intensity(r, vis=x, ir=1 - x),
        lambda r: fusion_gradient(r, vis=x, ir=1 - x),
        lambda r: cc(r, x),
        lambda r: cc(r, x, per="channel"),
    ]
    for term in terms:  # random images stay away from kinks and ties
        assert torch.autograd.gradcheck(term, (r,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("stage", [stage1_loss, stage2_loss])
def test_batch_loss_is_the_mean_of_its_samples(stage):
    f, pair = make_features(batch=3)
    whole = stage(f, **pair)[0]
    alone = [
        stage({k: v[i : i + 1] for k, v in f.items()}, **{k: v[i : i + 1] for k, v in pair.items()})[0]
        for i in range(3)
    ]
    assert_close(whole, torch.stack(alone).mean(), rtol=1e-5, atol=0)  # float32 sums in another order


def test_low_precision_features_are_raised():
    f, pair = make_features()
    low = {k: v.bfloat16() for k, v in f.items()}
    raised = {k: v.float() for k, v in low.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = stage1_loss(low, **pair)[0] + stage2_loss(low, **pair)[0]
    assert got.dtype == torch.float32
    assert_close(got, stage1_loss(raised, **pair)[0] + stage2_loss(raised, **pair)[0], atol=0, rtol=0)


# Bad input


def bad_calls():
    x, (f, pair) = rand(2, 1, 16, 16, seed=0), make_features()
    no_graph = {k: v for k, v in f.items() if k != "graph_ir"}
    return {
        "dssim variant": (lambda: dssim(x, x, variant="text"), "released"),
        "dssim size": (lambda: dssim(x[..., :5], x[..., :5]), "at least 6"),
        "broadcast": (lambda: sobel_l1(x, x[:1]), "differ"),
        "bytes": (lambda: spatial_gradient_l1(x.byte(), x), "floating"),
        "gram": (lambda: gram(x[0]), "B×C×H×W"),
        "neighbourhood": (lambda: intensity_loss(x, x, neighbourhood=2), "odd"),
        "intensity variant": (lambda: intensity_loss(x, x, variant="x"), "paper"),
        "reading": (lambda: semantic_loss(x, x, reading="edges"), "foreground"),
        "channels": (lambda: semantic_loss(x.repeat(1, 3, 1, 1), x.repeat(1, 3, 1, 1)), "C=3"),
        "labels": (lambda: lovasz_softmax(x, torch.zeros(2, 3, 3)), "B×K×H×W"),
        "cc shape": (lambda: cc(x, x[:, :, 1:]), "differ"),
        "cc per": (lambda: cc(x, x, per="pixel"), "channel"),
        "feature": (lambda: stage2_loss(no_graph, **pair), "graph_ir missing"),
        "image": (lambda: stage1_loss({}, **pair), "recon_vis"),
        "fused size": (lambda: stage2_loss({**f, "fused": x[..., 1:]}, **pair), "fused"),
        "pair": (lambda: stage1_loss(f, vis=x, ir=x[:1]), "ir"),
        "stage variant": (lambda: stage1_loss(f, **pair, variant="x"), "variant"),
        "record": (lambda: Stage1Loss(reading="x"), "reading"),
        "preset": (lambda: LossWeights.preset("text"), "printed"),
        "field": (lambda: LossWeights.preset("paper", alpha9=1), "alpha9"),
        "negative": (lambda: LossWeights(alpha1=-1), "alpha1"),
        "nan": (lambda: LossWeights(beta1=float("nan")), "beta1"),
        "delta": (lambda: LossWeights(delta=1.0), "delta"),
        "all zero": (
            lambda: stage1_loss(
                f, **pair, weights=LossWeights(alpha1=0, alpha2=0, alpha3=0, beta1=0, semantic=0, intensity=0)
            ),
            "all are 0",
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_named(name):
    call, word = bad_calls()[name]
    with pytest.raises(InputError, match=word):
        call()


# Golden values of the release

GOLDEN = os.environ.get("SMFNET_GOLDEN")
KEYS = (
    "sobel_l1_vis",
    "sobel_l1_ir",
    "spatial_gradient_l1_vis",
    "gram_mse_ir",
    "dssim_vis",
    "dssim_ir",
    "cc_base",
    "cc_detail",
    "cc_graph",
    "stage2_intensity",
    "stage2_gradient",
    "stage2_total_without_decomposition",
    "lovasz_released_value",
    "lovasz_released_max_abs_gradient",
)


def released_losses():
    "Every golden key, computed by the released variants on the golden activations."
    a = load_file(Path(GOLDEN) / "released_activations_seed7.safetensors")
    pair = {"vis": a["vis"], "ir": a["ir"]}
    _, one = stage1_loss(a, **pair, variant="released")
    total, two = stage2_loss(a, **pair, variant="released", weights=LossWeights.preset("released", alpha4=0))
    black, r = a["vis"].clone(), a["recon_vis"].clone().requires_grad_()
    black[..., :3, :3] = 0
    value = semantic_loss(r, black, variant="released")
    value.backward()
    return {
        "sobel_l1_vis": one["sobel_vis"],
        "sobel_l1_ir": one["sobel_ir"],
        "spatial_gradient_l1_vis": one["spatial_gradient_vis"],
        "gram_mse_ir": one["intensity_ir"],
        "dssim_vis": one["ssim_vis"],
        "dssim_ir": one["ssim_ir"],
        "cc_base": two["cc_base"],
        "cc_detail": two["cc_detail"],
        "cc_graph": two["cc_graph"],
        "stage2_intensity": two["intensity"],
        "stage2_gradient": two["gradient"],
        "stage2_total_without_decomposition": total,
        "lovasz_released_value": value.detach(),
        "lovasz_released_max_abs_gradient": r.grad.abs().max(),
    }


@pytest.mark.skipif(not GOLDEN, reason="the environment variable SMFNET_GOLDEN is not set")
def test_golden_keys_are_all_covered():
    golden = json.loads((Path(GOLDEN) / "released_losses_seed7.json").read_text())
    assert set(golden) == set(KEYS) == set(released_losses())


@pytest.mark.skipif(not GOLDEN, reason="the environment variable SMFNET_GOLDEN is not set")
@pytest.mark.parametrize("key", KEYS)
def test_golden_released_losses(key):
    golden = json.loads((Path(GOLDEN) / "released_losses_seed7.json").read_text())
    assert float(released_losses()[key]) == pytest.approx(
        golden[key], rel=1e-5, abs=0
    )  # float32 sums in another order


@pytest.mark.skipif(not GOLDEN, reason="the environment variable SMFNET_GOLDEN is not set")
def test_golden_stage2_total_with_inert_decomposition():
    a = load_file(Path(GOLDEN) / "released_activations_seed7.safetensors")
    golden = json.loads((Path(GOLDEN) / "released_losses_seed7.json").read_text())
    total, _ = stage2_loss(
        a, vis=a["vis"], ir=a["ir"], variant="released", weights=LossWeights.preset("released")
    )
    inert = 2 * 2 * golden["cc_detail"] ** 2 / (golden["cc_base"] + 1.01)
    assert float(total) == pytest.approx(
        golden["stage2_total_without_decomposition"] + inert, rel=1e-5, abs=0
    )
