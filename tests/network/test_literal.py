"""The yardstick of all speed figures, bench/literal.py, computes what the release computes."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smfnet.core.checks import golden_file

SOURCE = Path(__file__).parents[2] / "bench" / "literal.py"
SPEC = importlib.util.spec_from_file_location("literal", SOURCE)
literal = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(literal)

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SMALL = dict(dim=16, heads=4, groups=1, depth=1)


def golden(name):
    path = golden_file(name)
    if path is None:
        pytest.skip(f"{name}: SMFNET_GOLDEN does not lead to it")
    return path


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights():
    return load_file(golden("released_weights_seed7.safetensors"))


@pytest.fixture(scope="module")
def activations():
    return load_file(golden("released_activations_seed7.safetensors"))


def small(**options):
    torch.manual_seed(0)
    return literal.LiteralSMFNet(**SMALL, **options)


def pair(h, w, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return dict(vis=torch.rand(batch, 1, h, w, generator=g), ir=torch.rand(batch, 1, h, w, generator=g))


# float32 is the demand. In float64 the result no longer depends on the processor's kernels: what is left is
# the rounding error of the reference itself (8.0e-6 where |base_fused| reaches 9.9), the same everywhere.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_golden_activation(weights, activations, dtype, one_thread):
    model = literal.LiteralSMFNet().load_released(weights).to(dtype)
    found = model.features(vis=activations["vis"].to(dtype), ir=activations["ir"].to(dtype))
    assert set(found) == set(activations) - {"vis", "ir"}
    errors = {name: (found[name] - activations[name]).abs().max().item() for name in found}
    for name, error in sorted(errors.items()):
        print(f"{name:13} {error:.2e}")
    assert max(errors.values()) <= 1e-5, errors


def test_public_calls_agree_with_features(weights, activations, one_thread):
    model = literal.LiteralSMFNet().load_released(weights)
    images = {name: activations[name] for name in ("vis", "ir")}
    torch.testing.assert_close(model.fuse(**images), activations["fused"], atol=1e-5, rtol=0)
    for name, image in model.reconstruct(**images).items():
        torch.testing.assert_close(image, activations[name], atol=1e-5, rtol=0)


def test_released_weights_need_the_slip(weights, activations):
    model = literal.LiteralSMFNet(edge_gating="neighbour").load_released(weights)
    found = model.features(vis=activations["vis"], ir=activations["ir"])
    assert (found["ir_base"] - activations["ir_base"]).abs().max() <= 1e-5  # before the graph: the same
    assert (found["graph_ir"] - activations["graph_ir"]).abs().max() > 1e-3


def test_live_and_unused_part_of_the_release():
    sizes = {
        k: math.prod(shape)
        for k, (shape, _) in json.loads(golden("released_state_dict.json").read_text()).items()
    }
    ours = {literal.released_key(name) for name in literal.LiteralSMFNet().state_dict()}
    unused = {k for k in sizes if re.match(literal.UNUSED, k)}
    assert ours | unused == set(sizes) and not ours & unused
    learnable = {k: n for k, n in sizes.items() if not k.endswith(BUFFERS)}
    assert sum(learnable.values()) == 3_148_818
    assert sum(n for k, n in learnable.items() if k in unused) == 498_720
    assert sum(n for k, n in learnable.items() if k in ours) == literal.LIVE_PARAMETERS


def test_parameter_count():
    assert sum(p.numel() for p in literal.LiteralSMFNet().parameters()) == literal.LIVE_PARAMETERS


def test_flops_of_a_pair_and_of_what_folding_would_save():
    flops = literal.LiteralSMFNet().flops(128, 128)
    assert flops / 1e9 == pytest.approx(156.6, abs=0.05)
    # T2's own pair of convolutions against one 3×3 of 64→192: 2 encoders × 4 blocks, 2 per multiply-add
    pixels, pointwise, dense, folded = 128 * 128, 64 * 192, 192 * 192 * 9, 64 * 192 * 9
    assert 2 * 8 * pixels * (pointwise + dense - folded) / flops == pytest.approx(0.39, abs=0.005)


def test_names_of_the_release_are_unique():
    names = list(literal.LiteralSMFNet().state_dict())
    assert len({literal.released_key(n) for n in names}) == len(names)


def test_foreign_weights_are_refused():
    model = small()
    state = {literal.released_key(k): v for k, v in small().state_dict().items()}
    assert not model.load_released(state).training
    first = next(iter(state))
    with pytest.raises(ValueError, match="unexpected.*stranger"):
        model.load_released({**state, "stranger": torch.ones(1)})
    with pytest.raises(ValueError, match=f"missing.*{re.escape(first)}"):
        model.load_released({k: v for k, v in state.items() if k != first})
    with pytest.raises(ValueError, match="edge_gating"):
        literal.LiteralSMFNet(edge_gating="slip")
    with pytest.raises(ValueError, match="dim"):
        literal.LiteralSMFNet(dim=20)


@pytest.mark.parametrize("edge_gating", literal.EDGE_GATINGS)
def test_message_by_hand(edge_gating):
    messages = literal.Messages(4, edge_gating)
    with torch.no_grad():
        messages.edge.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-1, 1, -1, 1]])[:, :, None, None])
    node, first, second = (
        torch.tensor(v)[None, :, None, None] for v in ([1.0, 1, 1, 1], [1.0, 1, 1, 0], [0.0, 1, 0, 1])
    )
    g0, g1 = (1 / (1 + math.exp(-4))), (1 / (1 + math.exp(2)))  # edge responses 4 and -2
    expected = {"neighbour": [g0, g0 + g1, g0, g1], "channel_interleaved": [g0, 2 * g1, g0, g1]}[edge_gating]
    found = messages.message(node, first, second).detach().flatten()
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)  # float32, sums of four


@pytest.mark.parametrize("edge_gating", literal.EDGE_GATINGS)
def test_odd_sizes_and_no_dead_parameter(edge_gating):
    model = small(edge_gating=edge_gating)
    for messages in (model.graph.within_ir, model.graph.within_vis):
        torch.nn.init.constant_(messages.gamma, 0.5)
    images = pair(17, 23)
    loss = 0
    for stage in (1, 2):
        for name, value in model(**images, stage=stage).items():
            assert value.shape == (2, 1 if name in ("fused", "recon_vis", "recon_ir") else 16, 17, 23)
            loss = loss + (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))).sum()
    loss.backward()
    dead = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    assert not dead


def loss1(f):
    return (f["recon_vis"] - 0.2).abs().mean() + (f["recon_ir"] - 0.8).abs().mean()


def loss2(f):
    return (f["fused"] - 0.2).abs().mean()


def test_stages_train_their_sub_networks():
    model = small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    changed = lambda: {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainer = literal.LiteralTrainer(model, 1)
    trainer.step(*pair(24, 24).values(), loss1)
    assert changed() == {"encoder", "decoder", "graph"}
    trainer.stage = 2
    trainer.step(*pair(24, 24).values(), loss2)
    assert changed() == {"encoder", "decoder", "graph", "base_fusion", "detail_fusion"}


def test_each_gradient_is_clipped():
    model = small()
    literal.LiteralTrainer(model, 2).step(*pair(24, 24).values(), lambda f: 1000 * loss2(f))
    for name in literal.LiteralTrainer.STAGES[2]:
        norm = torch.stack(
            [p.grad.norm() for p in getattr(model, name).parameters() if p.grad is not None]
        ).norm()
        assert norm.item() == pytest.approx(
            0.01, rel=1e-3
        )  # clip_grad_norm_ adds 1e-6 to the norm it divides by


def test_learning_rates():
    trainer = literal.LiteralTrainer(small(), 1)
    rate = lambda name: trainer.optimisers[name].param_groups[0]["lr"]
    for stage, epochs, encoder, fusion in (
        (1, 40, 2.5e-5, 1e-4),
        (2, 80, 1.5625e-6, 6.25e-6),
        (2, 60, 1e-6, 1e-6),
    ):
        trainer.stage = stage
        trainer.step(*pair(16, 16, 1).values(), loss1 if stage == 1 else loss2)
        for _ in range(epochs):
            trainer.end_epoch()
        assert rate("encoder") == pytest.approx(encoder) and rate("detail_fusion") == pytest.approx(fusion)


def test_loss_falls():
    model = small()
    trainer = literal.LiteralTrainer(model, 2, lr=1e-3)
    losses = [trainer.step(*pair(24, 24).values(), loss2) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("edge_gating", ["channel_interleaved", "neighbour"])
def test_package_agrees_with_the_literal_version(edge_gating):
    """Two independent implementations with equal random weights agree in every intermediate result."""
    from smfnet.network.model import SMFNet
    from smfnet.network.released import load_released

    torch.manual_seed(3)
    plain = literal.LiteralSMFNet(edge_gating=edge_gating).eval()
    for name, p in plain.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(p, 0.7)
    released = load_released(
        {literal.released_key(k): v for k, v in plain.state_dict().items()}, verbose=False
    )
    ours = SMFNet("paper", edge_gating=edge_gating).eval()
    ours.load_state_dict(released.state_dict())
    g = torch.Generator().manual_seed(0)
    pair = {k: torch.rand(2, 1, 19, 26, generator=g) for k in ("vis", "ir")}
    a, b = plain.features(**pair), ours.features(**pair)
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=2e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
