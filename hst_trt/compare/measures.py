"""The measures: pure functions of arrays, each with the source of its formula."""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 2000
Z95 = 1.959964
"""Of the normal distribution: 95 % lie within so many standard deviations."""


def wilson(right: int, total: int) -> Interval:
    """The 95 % score interval of a share (E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical
    Inference", 1927); sound at 0 and 1 too, where the bootstrap's has no width."""
    share, z2 = right / total, Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of pictures [N, H, W, 3] uint8, [N]; infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of pictures [N, H, W, 3] uint8, [N]: mean over colours and over all whole windows.

    Z. Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, with its constants:
    an 11x11 Gaussian window of 1.5 pixels, K1 = 0.01, K2 = 0.03.
    """
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    line /= line.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        down: np.ndarray = sum(weight * x[:, k : x.shape[1] - 10 + k] for k, weight in enumerate(line))
        across: np.ndarray = sum(weight * down[:, :, k : x.shape[2] - 10 + k] for k, weight in enumerate(line))
        return across

    x, y = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similar: np.ndarray = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similar.mean((1, 2, 3))


def resampled(count: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of `count` cases is drawn in each resample, [resamples, count]; the same for everything compared."""
    rng = np.random.default_rng((seed, count))
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def weighted_means(values: np.ndarray) -> np.ndarray:
    """The mean of values [cases] as they are, and in every resample, [1 + resamples]."""
    return np.vstack([np.ones(len(values)), resampled(len(values))]) @ values / len(values)


def interval(values: np.ndarray) -> Interval:
    """The middle 95 % of resampled values: the percentile bootstrap."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> Interval:
    """Of the mean of values [cases]; of a mean difference, if the values are differences of the same cases."""
    return interval(weighted_means(values)[1:])


class Kid:
    """Kernel distances of sets of features to one reference set: the unbiased squared maximum mean discrepancy with the
    cubic kernel (x y / d + 1)^3, the formula of M. Binkowski et al., "Demystifying MMD GANs", 2018, on other features.

    Args:
        reference: features [M, d] of real pictures.
    """

    def __init__(self, reference: np.ndarray) -> None:
        self._reference = reference.astype(np.float64)
        self._real = _kernel(self._reference, self._reference)

    def __call__(self, features: np.ndarray) -> float:
        """May be a little below 0, as it has no bias."""
        once = (np.ones((1, len(features))), np.ones((1, len(self._reference))))
        return float(self._estimates(features, *once)[0])

    def resampled(self, features: np.ndarray) -> np.ndarray:
        """The estimate for each resample of cases and reference, [resamples]; paired between sets of the same cases."""
        return self._estimates(features, resampled(len(features), seed=1), resampled(len(self._reference), seed=2))

    def _estimates(self, features: np.ndarray, drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Weights say how often a picture was drawn. Pairs of a picture with itself are left out also if it was drawn
        twice: they would make the estimate biased in every resample."""
        x = features.astype(np.float64)
        cross = ((drawn @ _kernel(x, self._reference)) * real).sum(1) / (drawn.sum(1) * real.sum(1))
        return _within(_kernel(x, x), drawn) + _within(self._real, real) - 2 * cross


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel


def _within(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of a kernel matrix over pairs of different cases, for each row of weights."""
    pairs = ((weights @ kernel) * weights).sum(1) - weights**2 @ np.diag(kernel)
    mean: np.ndarray = pairs / (weights.sum(1) ** 2 - (weights**2).sum(1))
    return mean
