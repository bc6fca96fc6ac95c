"""Hamiltonian inference with learned parts, for Pyro."""

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.kinetic import (
    LearnedGaussianKinetic,
    NeuralKinetic,
    RelativisticKinetic,
)
from pyro_hamflow.dynamics.training import GradientMatching, TrajectoryMatching
from pyro_hamflow.flows.bases import SoftUniform
from pyro_hamflow.flows.fit import fit_flow, fit_guide
from pyro_hamflow.flows.guide import AutoNeuralHamiltonianFlow
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.flows.losses import ForwardKL, ReverseKL
from pyro_hamflow.mcmc.amortized import AmortizedSurrogate, learn_surrogate
from pyro_hamflow.mcmc.flow_mh import FlowMH
from pyro_hamflow.mcmc.kernels import HMC, NUTS
from pyro_hamflow.mcmc.pseudo_marginal_kernels import PseudoMarginalHMC, PseudoMarginalNUTS
from pyro_hamflow.mcmc.refresh import CorrelatedRefresh, EllipticalSliceRefresh
from pyro_hamflow.mcmc.runner import MCMC
from pyro_hamflow.mcmc.surrogate_kernels import HNNHMC, HNNNUTS
from pyro_hamflow.model.marginal import marginalize, noise
from pyro_hamflow.model.quality import EstimatorQuality, estimator_quality
from pyro_hamflow.results.importance import ImportanceSamples, importance_sample
from pyro_hamflow.results.inference_data import to_inference_data
from pyro_hamflow.results.plots import plot_momenta, plot_path, plot_potential

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "HNNHMC",
    "HNNNUTS",
    "MCMC",
    "NUTS",
    "AmortizedSurrogate",
    "AutoNeuralHamiltonianFlow",
    "CorrelatedRefresh",
    "EllipticalSliceRefresh",
    "EstimatorQuality",
    "FlowMH",
    "ForwardKL",
    "GradientMatching",
    "ImportanceSamples",
    "LearnedGaussianKinetic",
    "NeuralHamiltonianFlow",
    "NeuralKinetic",
    "PotentialNetwork",
    "PseudoMarginalHMC",
    "PseudoMarginalNUTS",
    "RelativisticKinetic",
    "ReverseKL",
    "SoftUniform",
    "TrajectoryMatching",
    "estimator_quality",
    "fit_flow",
    "fit_guide",
    "importance_sample",
    "learn_surrogate",
    "marginalize",
    "noise",
    "plot_momenta",
    "plot_path",
    "plot_potential",
    "to_inference_data",
]
