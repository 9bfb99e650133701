"""The losses of both stages once more, in plain NumPy and float64: no code of the package, no speed.

Written from the paper's equations and, where `released` says so, from what the authors' code computes. The
Lovász extension is taken in another form than the package's: as the mean Jaccard distance of all cuts through
the errors, not as sorted errors times steps.
"""

import numpy as np
from scipy.ndimage import correlate, correlate1d

SOBEL = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def images(x):
    """The H×W planes of a B×1×H×W array."""
    return [image[0] for image in x]


def ssim(x, y):
    """Mean SSIM of two images: Gaussian window of 11 pixels, sigma 1.5, mirrored borders, range 1."""
    t = np.arange(11) - 5
    window = np.exp(-(t**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(z):
        return correlate1d(correlate1d(z, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    top = (2 * mx * my + 0.01**2) * (2 * vxy + 0.03**2)
    return (top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))).mean()


def strength(x):
    """Edge strength |gx| + |gy| of an image, zero padded."""
    return sum(np.abs(correlate(x, kernel, mode="constant")) for kernel in (SOBEL, SOBEL.T))


def signed(x):
    """Both normalised Sobel maps of an image, borders repeated."""
    return np.stack([correlate(x, kernel / 8, mode="nearest") for kernel in (SOBEL, SOBEL.T)])


def over_images(function, *arrays):
    """Mean of a function over the images of a batch."""
    return float(np.mean([function(*planes) for planes in zip(*map(images, arrays), strict=True)]))


def energy(x):
    """The 1×1 Gram matrix of an image."""
    return (x * x).mean()


def jaccard(mistakes, truth):
    """Jaccard distance of the truth from the prediction that makes these mistakes."""
    return 1 - (truth & ~mistakes).sum() / (truth | mistakes).sum()


def lovasz(errors, truth):
    """Lovász extension of the Jaccard distance, by cuts through the errors."""
    levels = np.concatenate([[0.0], np.unique(errors)])
    cuts = zip(levels[:-1], levels[1:], strict=True)
    return sum((high - low) * jaccard(errors > low, truth) for low, high in cuts if high > low)


def lovasz_softmax(scores, labels):
    """Mean over the classes that occur; scores K×N, labels N."""
    present = [k for k in range(len(scores)) if (labels == k).any()]
    return np.mean([
        lovasz(np.where(labels == k, 1 - scores[k], scores[k]), labels == k) for k in present
    ])  # fmt: skip


def ordered_classes(guess, source, classes=12):
    """The default reading of the semantic term, for one image."""
    labels = np.minimum((source * classes).astype(int), classes - 1).ravel()
    centres = (np.arange(classes)[:, None] + 0.5) / classes
    scores = np.exp(-0.5 * ((guess.ravel() - centres) * classes) ** 2)
    return lovasz_softmax(scores / scores.sum(0), labels)


def lower_median(x):
    """The smaller of the two middle values."""
    return np.sort(x, axis=None)[(x.size - 1) // 2]


def foreground(guess, source):
    """The other reading, for one image."""
    middle = lower_median(source)
    threshold = middle + 1.4826 * lower_median(np.abs(source - middle))
    truth = (source > threshold).ravel()
    score = 1 / (1 + np.exp(-(guess.ravel() - threshold) / 0.05))
    return lovasz(np.where(truth, 1 - score, score), truth)


def correlations(f, released):
    """Correlation of each kind of features: one a sample, or one for the whole batch."""
    pairs = {"base": ("ir_base", "vis_base"), "detail": ("ir_detail", "vis_detail"),
             "graph": ("graph_ir", "graph_vis")}  # fmt: skip
    found = {}
    for kind, (a, b) in pairs.items():
        one, two = (f[n].reshape(1 if released else len(f[n]), -1) for n in (a, b))
        found[kind] = np.array([np.corrcoef(p, q)[0, 1] for p, q in zip(one, two, strict=True)])
    return found


def losses(f, *, vis, ir, variant="paper"):
    """Every term, correlation and total of both stages, by name; arrays B×C×H×W in float64."""
    released = variant == "released"
    half = 0.5 if released else 1.0
    cc = correlations(f, released)
    second = cc["detail"] if released else cc["graph"]
    found = {f"cc_{kind}": float(value.mean()) for kind, value in cc.items()}
    for name, source in (("vis", vis), ("ir", ir)):
        guess = f[f"recon_{name}"]
        found[f"ssim_{name}"] = half * (1 - over_images(ssim, guess, source))
        found[f"sobel_{name}"] = over_images(
            lambda a, b: np.abs(strength(a) - strength(b)).mean(), guess, source
        )
    found["spatial_gradient_vis"] = over_images(
        lambda a, b: np.abs(signed(a) - signed(b)).mean(), f["recon_vis"], vis
    )
    power = 2 if released else 1
    found["intensity_ir"] = over_images(
        lambda a, b: np.abs(energy(a) - energy(b)) ** power, f["recon_ir"], ir
    )
    if released:
        found["semantic_vis"] = 1 - float((vis == 0).mean())
    else:
        found["semantic_vis"] = over_images(ordered_classes, f["recon_vis"], vis)
        found["foreground_vis"] = over_images(foreground, f["recon_vis"], vis)
    found["decomposition1"] = float((cc["detail"] ** 2 / (cc["base"] + 1.01)).mean())
    found["decomposition2"] = float(((cc["detail"] ** 2 + second**2) / (cc["base"] + 1.01)).mean())
    found["intensity"] = float(np.abs(f["fused"] - np.maximum(vis, ir)).mean())
    found["gradient"] = over_images(
        lambda a, b, c: np.abs(strength(a) - np.maximum(strength(b), strength(c))).mean(), f["fused"], vis, ir
    )
    found["stage1"] = (
        8 * (found["ssim_vis"] + found["ssim_ir"])
        + 10 * (found["sobel_vis"] + found["sobel_ir"])
        + found["semantic_vis"]
        + found["intensity_ir"]
        + 2 * found["decomposition1"]
        + 5 * found["spatial_gradient_vis"]
    )
    found["stage2"] = found["intensity"] + 2 * found["decomposition2"] + 10 * found["gradient"]
    return found
