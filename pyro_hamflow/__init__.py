"""Hamiltonian inference with learned parts, for Pyro."""

from pyro_hamflow.mcmc.kernels import HMC, NUTS
from pyro_hamflow.mcmc.pseudo_marginal_kernels import PseudoMarginalHMC, PseudoMarginalNUTS
from pyro_hamflow.mcmc.refresh import CorrelatedRefresh, EllipticalSliceRefresh
from pyro_hamflow.mcmc.runner import MCMC
from pyro_hamflow.model.marginal import marginalize, noise
from pyro_hamflow.model.quality import EstimatorQuality, estimator_quality
from pyro_hamflow.results.inference_data import to_inference_data

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "CorrelatedRefresh",
    "EllipticalSliceRefresh",
    "EstimatorQuality",
    "PseudoMarginalHMC",
    "PseudoMarginalNUTS",
    "estimator_quality",
    "marginalize",
    "noise",
    "to_inference_data",
]
