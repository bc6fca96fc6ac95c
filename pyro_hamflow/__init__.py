"""Hamiltonian inference with learned parts, for Pyro."""

from pyro_hamflow.flows.auto_flow import AutoFlow
from pyro_hamflow.flows.bases import SoftUniform
from pyro_hamflow.flows.fit import fit_flow, fit_guide
from pyro_hamflow.flows.guide import AutoNeuralHamiltonianFlow
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.flows.losses import ForwardKL, ReverseKL
from pyro_hamflow.flows.symmetry import SymmetrisedGuide
from pyro_hamflow.marginal.marginalize import marginalize, noise
from pyro_hamflow.marginal.quality import EstimatorQuality, estimator_quality
from pyro_hamflow.marginal.whiten import whiten
from pyro_hamflow.mcmc.kernels.flow import FlowMH
from pyro_hamflow.mcmc.kernels.flow_nuts import FlowNUTS
from pyro_hamflow.mcmc.kernels.hmc_nuts import HMC, NUTS
from pyro_hamflow.mcmc.kernels.hnn import HNNHMC, HNNNUTS
from pyro_hamflow.mcmc.kernels.mala import MALA
from pyro_hamflow.mcmc.kernels.pseudo_marginal import PseudoMarginalHMC, PseudoMarginalNUTS
from pyro_hamflow.mcmc.kernels.random_walk import RandomWalk
from pyro_hamflow.mcmc.mcmc import MCMC
from pyro_hamflow.mcmc.stopping import ess_above, rhat_below, time_over
from pyro_hamflow.mcmc.transitions.noise_refresh import (
    CorrelatedRefresh,
    EllipticalSliceRefresh,
    StretchRefresh,
)
from pyro_hamflow.networks.kinetic import LearnedGaussianKinetic, NeuralKinetic, RelativisticKinetic
from pyro_hamflow.programs.machine_code.store import clear_cache
from pyro_hamflow.results.future import FutureLeftOut, leave_future_out
from pyro_hamflow.results.inference_data import to_inference_data
from pyro_hamflow.results.plots import plot_momenta, plot_path, plot_potential
from pyro_hamflow.results.run_plots import (
    plot_estimator,
    plot_modes,
    plot_surrogate,
    plot_weights,
)
from pyro_hamflow.smc.importance import ImportanceSamples, importance_sample
from pyro_hamflow.smc.sampler import AnnealedSampler
from pyro_hamflow.smc.transport import AFT, CRAFT
from pyro_hamflow.surrogates.amortized.learn import learn_surrogate
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.losses import GradientMatching, TrajectoryMatching
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.version import __version__ as __version__

__all__ = [
    "AFT",
    "CRAFT",
    "HMC",
    "HNNHMC",
    "HNNNUTS",
    "MALA",
    "MCMC",
    "NUTS",
    "AmortizedSurrogate",
    "AnnealedSampler",
    "AutoFlow",
    "AutoNeuralHamiltonianFlow",
    "CorrelatedRefresh",
    "EllipticalSliceRefresh",
    "EstimatorQuality",
    "FlowMH",
    "FlowNUTS",
    "ForwardKL",
    "FutureLeftOut",
    "GradientMatching",
    "ImportanceSamples",
    "LearnedGaussianKinetic",
    "NeuralHamiltonianFlow",
    "NeuralKinetic",
    "PotentialNetwork",
    "PseudoMarginalHMC",
    "PseudoMarginalNUTS",
    "RandomWalk",
    "RelativisticKinetic",
    "ReverseKL",
    "SoftUniform",
    "StretchRefresh",
    "SymmetrisedGuide",
    "TrajectoryMatching",
    "clear_cache",
    "ess_above",
    "estimator_quality",
    "fit_flow",
    "fit_guide",
    "importance_sample",
    "learn_surrogate",
    "leave_future_out",
    "marginalize",
    "noise",
    "plot_estimator",
    "plot_modes",
    "plot_momenta",
    "plot_path",
    "plot_potential",
    "plot_surrogate",
    "plot_weights",
    "rhat_below",
    "time_over",
    "to_inference_data",
    "whiten",
]
