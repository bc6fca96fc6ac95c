"""Hamiltonian inference with learned parts, for Pyro."""

from pyro_hamflow.dynamics.kinetic import (
    LearnedGaussianKinetic,
    NeuralKinetic,
    RelativisticKinetic,
)
from pyro_hamflow.flows.bases import SoftUniform
from pyro_hamflow.flows.fit import fit_flow, fit_guide
from pyro_hamflow.flows.guide import AutoNeuralHamiltonianFlow
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.flows.losses import ForwardKL, ReverseKL
from pyro_hamflow.mcmc.flow_mh import FlowMH
from pyro_hamflow.mcmc.kernels import HMC, NUTS
from pyro_hamflow.mcmc.pseudo_marginal_kernels import PseudoMarginalHMC, PseudoMarginalNUTS
from pyro_hamflow.mcmc.refresh import CorrelatedRefresh, EllipticalSliceRefresh
from pyro_hamflow.mcmc.runner import MCMC
from pyro_hamflow.model.marginal import marginalize, noise
from pyro_hamflow.model.quality import EstimatorQuality, estimator_quality
from pyro_hamflow.results.importance import ImportanceSamples, importance_sample
from pyro_hamflow.results.inference_data import to_inference_data
from pyro_hamflow.results.plots import plot_momenta, plot_path, plot_potential

__version__ = "0.1.0"

__all__ = [
    "AutoNeuralHamiltonianFlow",
    "HMC",
    "MCMC",
    "NUTS",
    "CorrelatedRefresh",
    "EllipticalSliceRefresh",
    "EstimatorQuality",
    "FlowMH",
    "ForwardKL",
    "ImportanceSamples",
    "LearnedGaussianKinetic",
    "NeuralHamiltonianFlow",
    "NeuralKinetic",
    "PseudoMarginalHMC",
    "PseudoMarginalNUTS",
    "RelativisticKinetic",
    "ReverseKL",
    "SoftUniform",
    "estimator_quality",
    "fit_flow",
    "fit_guide",
    "importance_sample",
    "marginalize",
    "noise",
    "plot_momenta",
    "plot_path",
    "plot_potential",
    "to_inference_data",
]
