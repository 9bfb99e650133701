"""The network as one would first write it down: the yardstick that every speed figure is measured against.

Literal means: PyTorch modules in eager mode, float32, contiguous B×C×H×W; each modality is encoded in a
pass of its own; the 1×1 and the dense 3×3 convolution of T2 stay two convolutions; LayerNorm is spelt out
as mean and variance; attention is reshape, normalise, matrix product, softmax, matrix product; BatchNorm
and every activation are modules or calls of their own; the nodes of the graph are a Python list; training
keeps five Adam optimisers and clips five times. It is written from the description of the network alone and
shares no code with the package, so that its agreement with the package (and of both with the reference
activations) means something.

**This file is never tuned.** It is only corrected should it be found to compute something wrong.

The default configuration has 2,650,098 learnable parameters (`LIVE_PARAMETERS`), all of them reached by
`features`.
"""

import copy
import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LIVE_PARAMETERS = 2_650_098  # learnable, in the default configuration
DILATIONS = (4, 8, 16)
EDGE_GATINGS = ("channel_interleaved", "neighbour")


class LayerNorm(nn.Module):
    "Normalise each pixel over its channels: pixels into one axis, mean and variance, affine, and back."

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # B×C×H×W -> B×C×H×W
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias
        return x.transpose(1, 2).unflatten(2, (h, w))


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    "Attention between the channels of each head; q and k have unit length along the pixels. All B×C×H×W."
    b, c, h, w = q.shape
    heads = temperature.shape[0]
    q, k, v = (t.reshape(b, heads, c // heads, h * w) for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = torch.softmax(q @ k.transpose(-2, -1) * temperature, dim=-1)
    return (weights @ v).reshape(b, c, h, w)


class MDTA(nn.Module):
    "Self attention of T1 (1×1, then depthwise 3×3) or of T2 (1×1, then dense 3×3: two convolutions)."

    def __init__(self, dim: int, heads: int, dense: bool):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.spatial = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=1 if dense else 3 * dim, bias=False)
        self.out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.spatial(self.qkv(x)).chunk(3, dim=1)
        return self.out(channel_attention(q, k, v, self.temperature))


class LeFF(nn.Module):
    "Feed-forward of T1: 1×1, depthwise 3×3, 1×1, a GELU after each, plus its own input."

    def __init__(self, dim: int):
        super().__init__()
        self.rise = nn.Conv2d(dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.fall = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.rise(x))
        y = F.gelu(self.depthwise(y))
        return F.gelu(self.fall(y)) + x


class Block(nn.Module):
    "A transformer block: T1, or T2 if `dense`."

    def __init__(self, dim: int, heads: int, dense: bool = False):
        super().__init__()
        self.norm1, self.attention = LayerNorm(dim), MDTA(dim, heads, dense)
        self.norm2 = LayerNorm(dim)
        if dense:
            rise, fall = nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.Conv2d(2 * dim, dim, 1, bias=False)
            self.feed = nn.Sequential(rise, nn.GELU(), fall)
        else:
            self.feed = LeFF(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class GRDB(nn.Module):
    "Gradient residual dense block: a dense part plus a (trainable) Sobel part."

    def __init__(self, dim: int):
        super().__init__()
        self.first = nn.Conv2d(dim, dim, 3, padding=1)
        self.dense1, self.dense2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(2 * dim, dim, 3, padding=1)
        self.dense_out = nn.Conv2d(3 * dim, dim, 1)
        self.sobel_x = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.sobel_y = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.sobel_out = nn.Conv2d(dim, dim, 1)
        kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        with torch.no_grad():
            self.sobel_x.weight.copy_(kernel.expand(dim, 1, 3, 3))
            self.sobel_y.weight.copy_(kernel.T.expand(dim, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.2)
        d = torch.cat([x, F.leaky_relu(self.dense1(x), 0.2)], 1)
        d = torch.cat([d, F.leaky_relu(self.dense2(d), 0.2)], 1)
        s = self.sobel_x(x).abs() + self.sobel_y(x).abs()
        return F.leaky_relu(self.dense_out(d) + self.sobel_out(s), 0.1)


class CrossAttention(nn.Module):
    "What one half finds in the other: query from `other`, keys and values from `own`."

    def __init__(self, half: int, heads: int):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q, self.kv = nn.Conv2d(half, half, 1), nn.Conv2d(half, 2 * half, 1)
        self.q_spatial = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.kv_spatial = nn.Conv2d(2 * half, 2 * half, 3, padding=1, groups=2 * half)
        self.out = nn.Conv2d(half, half, 1)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        q = self.q_spatial(self.q(other))
        k, v = self.kv_spatial(self.kv(own)).chunk(2, dim=1)
        return self.out(channel_attention(q, k, v, self.temperature))


def inverted_residual(half: int) -> nn.Sequential:
    "The ψ of equations 5–8; despite the name of its kind it has no skip."
    wide = 2 * half
    rise, fall = nn.Conv2d(half, wide, 1, bias=False), nn.Conv2d(wide, half, 1, bias=False)
    depthwise = nn.Conv2d(wide, wide, 3, groups=wide, bias=False)
    return nn.Sequential(rise, nn.ReLU6(), nn.ReflectionPad2d(1), depthwise, nn.ReLU6(), fall)


class Coupling(nn.Module):
    "Affine coupling of the encoder (equations 5–6)."

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 1)
        self.phi, self.rho, self.eta = (inverted_residual(dim // 2) for _ in range(3))

    def forward(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = self.mix(torch.cat([z1, z2], 1)).chunk(2, dim=1)
        z2 = z2 + self.phi(z1)
        z1 = z1 * torch.exp(self.rho(z2)) + self.eta(z2)
        return z1, z2


class InverseCoupling(nn.Module):
    "Coupling of the detail fusion (equations 7–8); the exponent is squashed into (-2, 2)."

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 1)
        self.r, self.y, self.f, self.p = (inverted_residual(dim // 2) for _ in range(4))

    @staticmethod
    def scale(s: Tensor) -> Tensor:
        return torch.exp(4 * (torch.sigmoid(s) - 0.5))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = self.mix(torch.cat([x1, x2], 1)).chunk(2, dim=1)
        y2 = (x2 - self.y(x1)) / self.scale(self.r(x1))
        y1 = (x1 - self.f(y2)) / self.scale(self.p(y2))
        return y1, y2


class BaseGroup(nn.Module):
    "A residual group of the base branch: (T1, T2) `depth` times, a bottleneck, plus the input."

    def __init__(self, dim: int, heads: int, depth: int):
        super().__init__()
        pairs = (nn.Sequential(Block(dim, heads), Block(dim, heads, dense=True)) for _ in range(depth))
        self.pairs = nn.Sequential(*pairs)
        narrow = dim // 4
        self.bottleneck = nn.Sequential(
            nn.Conv2d(dim, narrow, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, narrow, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, dim, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.pairs(x)) + x


class Encoder(nn.Module):
    "One image to its shallow, base and detail feature; the same weights for both modalities."

    def __init__(self, dim: int, heads: int, groups: int, depth: int):
        super().__init__()
        self.stem, self.shallow = nn.Conv2d(1, dim, 3, padding=1, bias=False), Block(dim, heads)
        self.base_in = nn.Conv2d(dim, dim, 3, padding=1)
        self.base = nn.Sequential(*(BaseGroup(dim, heads, depth) for _ in range(groups)))
        self.grdb, self.cross, self.coupling = GRDB(dim), CrossAttention(dim // 2, heads), Coupling(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B×1×H×W -> three of B×C×H×W
        shallow = self.shallow(self.stem(x))
        base = self.base(self.base_in(shallow))
        h1, h2 = self.grdb(shallow).chunk(2, dim=1)
        detail = torch.cat(self.coupling(self.cross(h1, h2), self.cross(h2, h1)), 1)
        return shallow, base, detail


def conv_bn_relu(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    "3×3 convolution without bias, BatchNorm, ReLU: three modules."
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Messages(nn.Module):
    "One round of messages between the scales of a modality (equations 14–16), with a convolutional GRU."

    def __init__(self, dim: int, edge_gating: str):
        super().__init__()
        self.edge_gating = edge_gating
        self.edge = nn.Conv2d(2 * dim, 2, 1, groups=2, bias=False)
        self.gates, self.candidate = nn.Conv2d(2 * dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        for conv in (self.gates, self.candidate):
            nn.init.normal_(conv.weight, std=0.01)

    def message(self, node: Tensor, first: Tensor, second: Tensor) -> Tensor:
        g = torch.sigmoid(self.edge(torch.cat([node - first, node - second], 1)))  # B×2×H×W
        if self.edge_gating == "neighbour":
            return g[:, :1] * first + g[:, 1:] * second
        g = g.repeat(
            1, node.shape[1] // 2, 1, 1
        )  # channel c gets gate c mod 2, whichever neighbour it belongs to
        return g * first + g * second

    def gru(self, message: Tensor, state: Tensor) -> Tensor:
        r, u = torch.sigmoid(self.gates(torch.cat([message, state], 1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([message, r * state], 1)))
        return (1 - u) * state + u * candidate

    def forward(self, nodes: list[Tensor]) -> list[Tensor]:
        updated = []
        for i, node in enumerate(nodes):
            neighbours = [other for j, other in enumerate(nodes) if j != i]
            updated.append(self.gamma * self.gru(self.message(node, *neighbours), node) + node)
        return updated


class Graph(nn.Module):
    "Graph reasoning on the two shallow features: nodes, across modalities, within each, and back to maps."

    def __init__(self, dim: int, edge_gating: str):
        super().__init__()
        self.embed_ir = nn.ModuleList(conv_bn_relu(dim, dim, d) for d in DILATIONS)
        self.embed_vis = nn.ModuleList(conv_bn_relu(dim, dim, d) for d in DILATIONS)
        self.a, self.b = nn.Conv2d(dim, 1, 1, bias=False), nn.Conv2d(dim, 1, 1, bias=False)
        self.within_ir, self.within_vis = Messages(dim, edge_gating), Messages(dim, edge_gating)
        self.merge_ir, self.merge_vis = conv_bn_relu(3 * dim, dim), conv_bn_relu(3 * dim, dim)
        self.join = nn.Conv2d(2 * dim, dim, 1)

    def across(self, ir: Tensor, vis: Tensor) -> tuple[Tensor, Tensor]:
        return vis * torch.sigmoid(self.b(vis - ir)) + ir, ir * torch.sigmoid(self.a(ir - vis)) + vis

    def forward(self, ir: Tensor, vis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nodes_ir = [embed(ir) for embed in self.embed_ir]
        nodes_vis = [embed(vis) for embed in self.embed_vis]
        for n in range(len(DILATIONS)):
            for _ in range(2):
                nodes_ir[n], nodes_vis[n] = self.across(nodes_ir[n], nodes_vis[n])
        for _ in range(2):
            nodes_ir, nodes_vis = self.within_ir(nodes_ir), self.within_vis(nodes_vis)
        ir, vis = self.merge_ir(torch.cat(nodes_ir, 1)), self.merge_vis(torch.cat(nodes_vis, 1))
        return ir, vis, self.join(torch.cat([ir, vis], 1))


class DetailFusion(nn.Module):
    "Fusion of the detail features: GRDB on their sum, then two inverse couplings."

    def __init__(self, dim: int):
        super().__init__()
        self.grdb = GRDB(dim)
        self.couplings = nn.ModuleList(InverseCoupling(dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.grdb(x).chunk(2, dim=1)
        for coupling in self.couplings:
            x1, x2 = coupling(x1, x2)
        return torch.cat([x1, x2], 1)


class Decoder(nn.Module):
    "A feature back to an image: one T1, three convolutions, sigmoid."

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.block = Block(dim, heads)
        self.head = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False),
            nn.LeakyReLU(0.01),
            nn.Conv2d(dim // 2, dim // 4, 3, padding=1, bias=False),
            nn.LeakyReLU(0.01),
            nn.Conv2d(dim // 4, 1, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.block(x)))


class LiteralSMFNet(nn.Module):
    "The whole network, literally. `fuse`, `reconstruct`, `features` run without gradients, `forward` with."

    def __init__(
        self,
        dim: int = 64,  # channels C of every feature
        heads: int = 8,  # of every attention
        groups: int = 2,  # residual groups of the base branch
        depth: int = 2,  # (T1, T2) pairs in each
        edge_gating: str = "channel_interleaved",  # as released, or "neighbour" (equation 15)
    ):
        super().__init__()
        if edge_gating not in EDGE_GATINGS:
            raise ValueError(f"edge_gating: {edge_gating!r} is not one of {', '.join(EDGE_GATINGS)}")
        if dim % 4 or dim % (2 * heads):
            raise ValueError(f"dim: {dim} must be a multiple of 4 and of twice the {heads} heads")
        self.encoder = Encoder(dim, heads, groups, depth)
        self.decoder = Decoder(dim, heads)
        self.base_fusion = Block(dim, heads)
        self.detail_fusion = DetailFusion(dim)
        self.graph = Graph(dim, edge_gating)

    def _encode(self, vis: Tensor, ir: Tensor) -> dict[str, Tensor]:
        f = {}
        f["vis_shallow"], f["vis_base"], f["vis_detail"] = self.encoder(vis)
        f["ir_shallow"], f["ir_base"], f["ir_detail"] = self.encoder(ir)
        f["graph_ir"], f["graph_vis"], f["graph_fused"] = self.graph(f["ir_shallow"], f["vis_shallow"])
        return f

    def _stage1(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        recon_vis = self.decoder(f["vis_base"] + f["vis_detail"] + f["graph_vis"])
        recon_ir = self.decoder(f["ir_base"] + f["ir_detail"] + f["graph_ir"])
        return dict(recon_vis=recon_vis, recon_ir=recon_ir)

    def _stage2(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        base = self.base_fusion(f["ir_base"] + f["vis_base"])
        detail = self.detail_fusion(f["ir_detail"] + f["vis_detail"])
        fused = self.decoder(base + detail + f["graph_fused"])
        return dict(base_fused=base, detail_fused=detail, fused=fused)

    def forward(self, *, vis: Tensor, ir: Tensor, stage: int) -> dict[str, Tensor]:
        "What training stage 1 or 2 computes, by name; images B×1×H×W in [0, 1], features B×C×H×W."
        f = self._encode(vis, ir)
        return {**f, **(self._stage1(f) if stage == 1 else self._stage2(f))}

    @torch.no_grad()
    def features(self, *, vis: Tensor, ir: Tensor) -> dict[str, Tensor]:
        "Every intermediate of both stages, by the names of the reference activations."
        f = self._encode(vis, ir)
        return {**f, **self._stage2(f), **self._stage1(f)}

    @torch.no_grad()
    def fuse(self, *, vis: Tensor, ir: Tensor) -> Tensor:
        "The fused image, B×1×H×W in (0, 1)."
        return self(vis=vis, ir=ir, stage=2)["fused"]

    @torch.no_grad()
    def reconstruct(self, *, vis: Tensor, ir: Tensor) -> dict[str, Tensor]:
        "Both sources from their own features: `recon_vis`, `recon_ir`."
        f = self(vis=vis, ir=ir, stage=1)
        return {name: f[name] for name in ("recon_vis", "recon_ir")}

    def flops(self, h: int, w: int) -> int:
        "Floating-point operations of fusing one h×w pair, 2 a multiply-add of convolutions and products."
        ghost = copy.deepcopy(self).to("meta")
        image = torch.empty(1, 1, h, w, device="meta")
        with FlopCounterMode(display=False) as counter:
            ghost.fuse(vis=image, ir=image)
        return counter.get_total_flops()

    def load_released(self, state: Mapping[str, Tensor]) -> "LiteralSMFNet":
        "Load `entry/key` names of the release, in evaluation mode; unknown keys are an error."
        own = {name: released_key(name) for name in self.state_dict()}
        missing = sorted(set(own.values()) - set(state))
        unexpected = sorted(k for k in set(state) - set(own.values()) if not re.match(UNUSED, k))
        if missing or unexpected:
            raise ValueError(
                f"released weights do not fit: missing {missing[:5]}, unexpected {unexpected[:5]}"
            )
        self.load_state_dict({name: state[key] for name, key in own.items()})
        return self.eval()


UNUSED = (
    r"BaseFuseLayer/module\.reduce_channel|DIDF_Encoder/module\.baseFeature\.(reduce_channel|norm|conv_after_body)\."
    r"|GraphModel/module\.graph\.(C_cat\.[2-5]|C_cls|graph\.C_ca)\."
)

# Our names to those of the release: applied in this order, each to the result of those before.
RENAMING = [
    (re.compile(old), new)
    for old, new in (
        # blocks; T2 first, while its path still shows
        (r"(pairs\.\d+\.1\.)attention\.temperature", r"\1attn.scale"),
        (r"(pairs\.\d+\.1\.)attention\.qkv", r"\1attn.qkv1"),
        (r"(pairs\.\d+\.1\.)attention\.spatial", r"\1attn.qkv2"),
        (r"(pairs\.\d+\.1\.)attention\.out", r"\1attn.proj"),
        (r"(pairs\.\d+\.1\.)feed\.0", r"\1mlp.project_in"),
        (r"(pairs\.\d+\.1\.)feed\.2", r"\1mlp.project_out"),
        (r"attention\.spatial", "attn.qkv_dwconv"),
        (r"attention\.out", "attn.project_out"),
        (r"attention\.", "attn."),
        (r"feed\.rise", "feed.linear1.0"),
        (r"feed\.depthwise", "feed.dwconv.0"),
        (r"feed\.fall", "feed.linear2.0"),
        (r"base_fusion\.feed", "base_fusion.mlp"),
        (r"feed\.", "ffn_leff."),
        (r"(norm[12])\.", r"\1.body."),
        (r"\.(phi|rho|eta)\.", r".theta_\1.bottleneckBlock."),
        (r"\.([ryfp])\.", r".\1.bottleneckBlock."),
        (r"\.mix\.", ".shffleconv."),
        (r"grdb\.first", "grdb.conv.conv"),
        (r"grdb\.dense([12])", r"grdb.GRDB.dense.conv\1.conv"),
        (r"grdb\.dense_out", "grdb.GRDB.convdown.conv"),
        (r"grdb\.sobel_([xy])", r"grdb.GRDB.sobelconv.conv\1"),
        (r"grdb\.sobel_out", "grdb.GRDB.convup.conv"),
        # encoder
        (r"encoder\.stem", "encoder.patch_embed.proj"),
        (r"encoder\.shallow", "encoder.encoder_level1.0"),
        (r"encoder\.base_in", "encoder.baseFeature.conv_first"),
        (r"encoder\.base\.", "encoder.baseFeature.layers."),
        (r"\.pairs\.", ".residual_group."),
        (r"\.bottleneck\.", ".conv."),
        (r"encoder\.grdb", "encoder.GRDB_module"),
        (r"encoder\.coupling", "encoder.detailFeature.layer"),
        (r"cross\.out", "cross.project_out"),
        (r"(q|kv)_spatial", r"\1_dwconv"),
        (r"encoder\.cross", "encoder.detailFeature.TCA"),
        # decoder and detail fusion
        (r"decoder\.block", "decoder.encoder_level1.0"),
        (r"decoder\.head", "decoder.output"),
        (r"detail_fusion\.grdb", "detail_fusion.GRDB"),
        (r"couplings", "net"),
        # graph: the release says rgb for infrared and dep for visible
        (r"graph\.embed_ir", "graph.graph.graph.ppm_rgb.convs"),
        (r"graph\.embed_vis", "graph.graph.graph.ppm_dep.convs"),
        (r"within_(ir|vis)\.edge", r"within_\1.C_wgt"),
        (r"within_(ir|vis)\.gates", r"within_\1.ConvGRU.ConvGates"),
        (r"within_(ir|vis)\.candidate", r"within_\1.ConvGRU.Conv_ct"),
        (r"graph\.within_ir", "graph.graph.graph.graph_rgb"),
        (r"graph\.within_vis", "graph.graph.graph.graph_dep"),
        (r"graph\.a\.", "graph.graph.graph.C_pa.0."),
        (r"graph\.b\.", "graph.graph.graph.C_pa.1."),
        (r"graph\.merge_ir", "graph.graph.C_cat.0"),
        (r"graph\.merge_vis", "graph.graph.C_cat.1"),
        (r"graph\.join", "graph.C_cls"),
        # the five entries
        (r"^encoder\.", "DIDF_Encoder/module."),
        (r"^decoder\.", "DIDF_Decoder/module."),
        (r"^base_fusion\.", "BaseFuseLayer/module."),
        (r"^detail_fusion\.", "DetailFuseLayer/module."),
        (r"^graph\.", "GraphModel/module."),
    )
]


def released_key(name: str) -> str:
    "The release's `entry/key` for one of our state names."
    for pattern, new in RENAMING:
        name = pattern.sub(new, name)
    return name


class LiteralTrainer:
    "Two-stage training as released: Adam, a step decay and a gradient clip for each of five sub-networks."

    STAGES = {
        1: ("encoder", "decoder", "graph"),
        2: ("encoder", "decoder", "base_fusion", "detail_fusion", "graph"),
    }

    def __init__(
        self,
        model: LiteralSMFNet,
        stage: int,  # 1 or 2; set the attribute to 2 later to go on with the same optimisers
        *,
        lr: float = 1e-4,
        decay: float = 0.5,
        decay_epochs: int = 20,
        lr_floor: float = 1e-6,
        clip: float = 0.01,  # largest gradient norm of a sub-network
    ):
        self.model, self.stage, self.lr_floor, self.clip = model, stage, lr_floor, clip
        self.optimisers = {n: torch.optim.Adam(getattr(model, n).parameters(), lr=lr) for n in self.STAGES[2]}
        self.schedules = {
            n: torch.optim.lr_scheduler.StepLR(o, step_size=decay_epochs, gamma=decay)
            for n, o in self.optimisers.items()
        }

    def step(self, vis: Tensor, ir: Tensor, loss_fn: Callable[[dict[str, Tensor]], Tensor]) -> float:
        "One update from one batch; `loss_fn` maps the features of the stage to a scalar, which is returned."
        self.model.train()
        active = self.STAGES[self.stage]
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
        loss = loss_fn(self.model(vis=vis, ir=ir, stage=self.stage))
        loss.backward()
        for name in active:
            nn.utils.clip_grad_norm_(getattr(self.model, name).parameters(), self.clip)
        for name in active:
            self.optimisers[name].step()
        return loss.item()

    def end_epoch(self) -> None:
        "Advance the schedules of the sub-networks that this stage trains; no rate falls below the floor."
        for name in self.STAGES[self.stage]:
            self.schedules[name].step()
            for group in self.optimisers[name].param_groups:
                group["lr"] = max(group["lr"], self.lr_floor)
