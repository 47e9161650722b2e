"""Metrics of samples: distances between features, coverage, memorisation and spectra, all in float64.

    extractor = load_extractor("inception")
    reference = FeatureStatistics.load("cifar10-32x32.npz")
    FeatureStatistics.fit(extract_features(extractor, samples)).distance(reference)    # FID

Samples and features are tensors, arrays, or iterables of batches.
"""

from gaussnet.metrics.classifier import SmallClassifier
from gaussnet.metrics.features import extract_features, load_extractor, to_uint8
from gaussnet.metrics.frechet import FeatureStatistics, frechet_distance
from gaussnet.metrics.kernel import KernelDistance, kernel_distance
from gaussnet.metrics.neighbours import Memorisation, PrecisionRecall, memorisation, precision_recall
from gaussnet.metrics.perceptual import PerceptualDistance, SquaredError, load_distance
from gaussnet.metrics.resampling import Extrapolated, Interval, frechet_infinity, frechet_interval
from gaussnet.metrics.spectrum import VarianceRatio, radial_power, radial_power_ratio, variance_ratio

__all__ = [
    "Extrapolated",
    "FeatureStatistics",
    "Interval",
    "KernelDistance",
    "Memorisation",
    "PerceptualDistance",
    "PrecisionRecall",
    "SmallClassifier",
    "SquaredError",
    "VarianceRatio",
    "extract_features",
    "frechet_distance",
    "frechet_infinity",
    "frechet_interval",
    "kernel_distance",
    "load_distance",
    "load_extractor",
    "memorisation",
    "precision_recall",
    "radial_power",
    "radial_power_ratio",
    "to_uint8",
    "variance_ratio",
]
