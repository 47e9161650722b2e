"""Fitting: streamed moments, eigenvalues, clusters. Everything is accumulated and solved in float64."""

from gaussnet.fit.clusters import kmeans_labels
from gaussnet.fit.moments import Data, Moments, fit_moments
from gaussnet.fit.spectrum import fit_covariance

__all__ = ["Data", "Moments", "fit_covariance", "fit_moments", "kmeans_labels"]
