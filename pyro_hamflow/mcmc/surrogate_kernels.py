"""The kernels that users name whose trajectories follow a learned energy."""

from __future__ import annotations

from pyro_hamflow.mcmc.kernels import HMC, NUTS
from pyro_hamflow.mcmc.neural import Neural


class HNNHMC(Neural, HMC):
    """Hamiltonian Monte Carlo along a learned energy, with vectorised chains.

    A network learns the posterior's energy in warm-up; trajectories then follow its gradient, which
    costs microseconds, and each draw is judged by the model's own energy. It pays where the model's
    gradient is dear; where it would not, true gradients are followed, and the run says so. On a
    model with noise sites the network learns the energy of the parameters alone; one estimate
    judges where they move with the noise held, and another the noise that is then drawn. Runs in
    :class:`pyro_hamflow.MCMC`, all chains at once, and in :class:`pyro.infer.MCMC`.

    Its arguments, and the errors that it raises, are those of
    :class:`~pyro_hamflow.mcmc.neural.Neural` and of :class:`~pyro_hamflow.HMC`.

    Attributes:
        surrogate: The network, after a run; its ``save`` writes it to a file.
        report: What it took to learn it, and what it is good for.

    Invariant:
        The posterior, exactly, whatever the network has learned, once warm-up has ended: it is then
        frozen, its gradient depends on the position alone, and the true energy decides.

    References:
        | Neural network gradient Hamiltonian Monte Carlo (Li, Holbrook, Shahbaba, Baldi, 2017)
        | https://arxiv.org/abs/1711.05307

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> kernel = HNNHMC(model, fallback=False, training_steps=100)
        >>> mcmc = MCMC(kernel, num_samples=50, warmup_steps=60, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> mcmc.get_samples()["mean"].shape, len(kernel.report.trainings)
        (torch.Size([200]), 3)
    """


class HNNNUTS(Neural, NUTS):
    """The No-U-Turn Sampler along a learned energy, with vectorised chains.

    What :class:`HNNHMC` is to HMC: trajectories grow along the network's gradient until they turn
    back. Each draw of the learned density so made is accepted or refused as a whole, by one true
    energy, or, with ``correction="per leaf"``, every point is weighted by its own.

    Its arguments, and the errors that it raises, are those of
    :class:`~pyro_hamflow.mcmc.neural.Neural` and of :class:`~pyro_hamflow.NUTS`.

    Attributes:
        surrogate: The network, after a run; its ``save`` writes it to a file.
        report: What it took to learn it, and what it is good for.

    Invariant:
        The posterior, exactly, whatever the network has learned, once warm-up has ended: No-U-Turn
        transitions are reversible for the learned density, and the true energy corrects for it.

    References:
        | Efficient Bayesian inference with latent Hamiltonian neural networks in No-U-Turn Sampling
        | https://arxiv.org/abs/2208.06120

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> kernel = HNNNUTS(model)  # whose gradients are cheap
        >>> mcmc = MCMC(kernel, num_samples=50, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> kernel.report.following
        'true gradients'
    """
