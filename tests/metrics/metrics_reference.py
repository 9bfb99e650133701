"""The nine metrics the plain way: NumPy and SciPy, one image at a time, two-dimensional filters.

This is the yardstick of `smfnet.metrics`: it follows the written protocol of Table 1 word by word, shares no
code with the package, and is slow. A = infrared, B = visible, F = fused, all H×W with whole numbers 0-255.
"""

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter1d
from scipy.signal import convolve2d

NAMES = ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "AG", "SSIM")


def entropy(image):
    "EN in bits, from the 256 counts."
    counts, _ = np.histogram(image, bins=256, range=(0, 256))
    p = counts[counts > 0] / image.size
    return float(-(p * np.log2(p)).sum())


def mutual_information(x, y):
    "Mutual information of two images in nats."
    joint, _, _ = np.histogram2d(x.ravel(), y.ravel(), bins=256, range=((0, 256), (0, 256)))
    joint /= joint.sum()
    px, py = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / (px * py)[seen])).sum())


def spatial_frequency(image):
    "SF: root of the mean squared horizontal plus vertical first difference."
    x = image.astype(np.float64)
    return float(np.sqrt((np.diff(x, axis=1) ** 2).mean() + (np.diff(x, axis=0) ** 2).mean()))


def average_gradient(image, half=False):
    "AG from central differences, one-sided at the borders."
    gy, gx = np.gradient(image.astype(np.float64))
    return float(np.sqrt((gx**2 + gy**2) / (2 if half else 1)).mean())


def correlation(x, y):
    "Pearson's correlation of two images; NaN when one is constant."
    x, y = x - x.mean(), y - y.mean()
    denominator = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / denominator) if denominator else float("nan")


def scd(fused, ir, vis):
    "Sum of the correlations of differences."
    f, a, b = (i.astype(np.float64) for i in (fused, ir, vis))
    return correlation(a, f - b) + correlation(b, f - a)


def gaussian(size):
    "Two-dimensional Gaussian window of sum 1 with sigma = size/5."
    t = np.arange(size) - size // 2
    w = np.exp(-(t[:, None] ** 2 + t[None, :] ** 2) / (2 * (size / 5) ** 2))
    return w / w.sum()


def vif(fused, source):
    "Pixel-domain visual information fidelity of `fused` with `source` as the reference."
    f, s = fused.astype(np.float64), source.astype(np.float64)
    numerator = denominator = 0.0
    for scale, size in enumerate((17, 9, 5, 3)):
        window = gaussian(size)

        def blur(x, window=window):
            return convolve2d(x, window, mode="valid")

        if scale > 0:
            f, s = blur(f)[::2, ::2], blur(s)[::2, ::2]
        mean_f, mean_s = blur(f), blur(s)
        var_f = np.maximum(blur(f * f) - mean_f**2, 0)
        var_s = np.maximum(blur(s * s) - mean_s**2, 0)
        cov = blur(f * s) - mean_f * mean_s
        g = cov / (var_s + 1e-10)
        sv = var_f - g * cov
        flat = var_s < 1e-10
        g[flat], sv[flat], var_s[flat] = 0, var_f[flat], 0
        flat = var_f < 1e-10
        g[flat], sv[flat] = 0, 0
        negative = g < 0
        sv[negative], g[negative] = var_f[negative], 0
        sv = np.maximum(sv, 1e-10)
        numerator += np.log10(1 + g**2 * var_s / (sv + 2)).sum()
        denominator += np.log10(1 + var_s / 2).sum()
    return float(numerator / denominator)


def edges(image):
    "Sobel strength and angle, zero padded."
    x = np.pad(image.astype(np.float64), 1)
    column = x[:-2] + 2 * x[1:-1] + x[2:]
    row = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    sx, sy = column[:, 2:] - column[:, :-2], row[:-2] - row[2:]
    angle = np.full(sx.shape, np.pi / 2)
    np.arctan(np.divide(sy, sx, out=np.zeros_like(sx), where=sx != 0), out=angle, where=sx != 0)
    return np.hypot(sx, sy), angle


def qabf(fused, ir, vis):
    "Xydeas and Petrovic's edge transfer."
    gf, af = edges(fused)
    total = weight = 0.0
    for source in (ir, vis):
        g, a = edges(source)
        small, large = np.minimum(g, gf), np.maximum(g, gf)
        ratio = np.where(g == gf, gf, np.divide(small, large, out=np.zeros_like(g), where=large > 0))
        similar = 1 - np.abs(a - af) / (np.pi / 2)
        q = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (similar - 0.8)))
        total, weight = total + (q * g).sum(), weight + g.sum()
    return float(total / weight)


def ssim(x, y, data_range=2.0):
    "Mean SSIM with a 7×7 uniform window; float32 between the passes, vertical first."
    x, y = x.astype(np.float32), y.astype(np.float32)

    def mean(z):
        return uniform_filter1d(uniform_filter1d(z, 7, axis=0), 7, axis=1)

    norm = np.float32(49 / 48)
    c1, c2 = np.float32((0.01 * data_range) ** 2), np.float32((0.03 * data_range) ** 2)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = (
        norm * (mean(x * x) - mx * mx),
        norm * (mean(y * y) - my * my),
        norm * (mean(x * y) - mx * my),
    )
    s = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(s[3:-3, 3:-3].mean(dtype=np.float64))


def evaluate(fused, ir, vis):
    "All nine metrics of one pair under the protocol of Table 1, and the two variants of the golden file."
    fused, ir, vis = (np.asarray(i, dtype=np.float32) for i in (fused, ir, vis))
    return {
        "EN": entropy(fused),
        "SD": float(fused.astype(np.float64).std()),
        "SF": spatial_frequency(fused),
        "MI": mutual_information(fused, ir) + mutual_information(fused, vis),
        "SCD": scd(fused, ir, vis),
        "VIF": vif(fused, ir) + vif(fused, vis),
        "Qabf": qabf(fused, ir, vis),
        "AG": average_gradient(fused),
        "SSIM": ssim(fused, ir) + ssim(fused, vis),
        "AG_half": average_gradient(fused, half=True),
        "SSIM_range255": ssim(fused, ir, 255.0) + ssim(fused, vis, 255.0),
    }


def gray(rgb):
    "Colour to gray as the protocol reads files: weighted in float32, rounded half to even."
    r, g, b = (rgb[..., i].astype(np.float32) for i in range(3))
    return np.rint(np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b)


def read(path):
    "An image file as H×W float32 0-255."
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB") if image.mode not in ("L", "RGB") else image)
    return pixels.astype(np.float32) if pixels.ndim == 2 else gray(pixels)


def round_trip(luminance, rgb):
    "The colour PNG that holds `luminance` (H×W, 0-255, unrounded) with the colours of `rgb`; H×W×3 bytes."
    r, g, b = (rgb[..., i].astype(np.float32) for i in range(3))
    y = np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b
    cr, cb = np.float32(0.713) * (r - y), np.float32(0.564) * (b - y)
    y = luminance.astype(np.float32)
    planes = (
        y + np.float32(1.403) * cr,
        y - np.float32(0.714) * cr - np.float32(0.344) * cb,
        y + np.float32(1.773) * cb,
    )
    return np.clip(np.rint(np.stack(planes, -1)), 0, 255).astype(np.uint8)
