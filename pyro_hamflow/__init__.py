"""Hamiltonian inference with learned parts, for Pyro."""

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.training import GradientMatching, TrajectoryMatching
from pyro_hamflow.mcmc.amortized import AmortizedSurrogate, learn_surrogate
from pyro_hamflow.mcmc.kernels import HMC, NUTS
from pyro_hamflow.mcmc.pseudo_marginal_kernels import PseudoMarginalHMC, PseudoMarginalNUTS
from pyro_hamflow.mcmc.refresh import CorrelatedRefresh, EllipticalSliceRefresh
from pyro_hamflow.mcmc.runner import MCMC
from pyro_hamflow.mcmc.surrogate_kernels import HNNHMC, HNNNUTS
from pyro_hamflow.model.marginal import marginalize, noise
from pyro_hamflow.model.quality import EstimatorQuality, estimator_quality
from pyro_hamflow.results.inference_data import to_inference_data

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "HNNHMC",
    "HNNNUTS",
    "MCMC",
    "NUTS",
    "AmortizedSurrogate",
    "CorrelatedRefresh",
    "EllipticalSliceRefresh",
    "EstimatorQuality",
    "GradientMatching",
    "PotentialNetwork",
    "PseudoMarginalHMC",
    "PseudoMarginalNUTS",
    "TrajectoryMatching",
    "estimator_quality",
    "learn_surrogate",
    "marginalize",
    "noise",
    "to_inference_data",
]
