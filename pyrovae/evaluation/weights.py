"""What importance weights say of the number that they estimate, and how far to trust it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from pyrovae.evaluation import pareto

POOR = 10  # an effective sample size below which an estimate is not to be trusted
MISSED = 0.05  # the probability with which an interval is meant to miss log p(x)


@dataclass(frozen=True)
class Evidence:
    """What K weighted particles say of log p(x), for each of N images, on the CPU.

    Where the weights w are uneven, few particles make up the estimate, and those that would matter most may
    be missing. Then log_evidence and its error are both too small, and the error does not show it. The
    effective sample size and Pareto k-hat (see `pareto`) do, and `reliable` puts them together. They can fail
    as well, since particles that all miss what matters look even: where many images are not reliable, do not
    trust the others.

    Attributes:
        log_evidence: (N,) log of the mean weight, in nats.
        effective_sample_size: (N,) (sum w)^2 / sum w^2, from 1 to K.
        bound: (N,) the mean log weight, in nats: the ELBO for importance sampling.
        variance: (N,) the variance of the log weight, in nats^2; nan for one particle.
        log_lik: (N,) the mean of log p(x|z) over the particles, unweighted, in nats.
        pareto_k: (N,) Pareto k-hat of the weights: inf where the tail is too sparse to be fitted, -inf where
            the largest weights are equal, nan for fewer than 100 particles, which are too few for it.
        particles: K.
    """

    log_evidence: Float[Tensor, " N"]
    effective_sample_size: Float[Tensor, " N"]
    bound: Float[Tensor, " N"]
    variance: Float[Tensor, " N"]
    log_lik: Float[Tensor, " N"]
    pareto_k: Float[Tensor, " N"]
    particles: int

    @property
    def error(self) -> Float[Tensor, " N"]:
        """The standard error of each log_evidence by the delta method, in nats; nan for one particle.

        It is the standard deviation of the weights over their mean and sqrt(K), and too small if K is.
        """
        excess = (self.particles / self.effective_sample_size - 1).clamp(min=0)  # the variance of w / mean w
        return (excess / (self.particles - 1)).sqrt()

    @property
    def interval(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """The ends, in nats, of an interval for each log p(x) that is meant to miss it in 5 % of cases.

        With t the quantile of Student's distribution with K - 1 degrees of freedom, it reaches t standard
        errors to both sides of log_evidence, and

        - down by no more than log 40 nats, since by Markov's inequality the mean weight is above 40 p(x)
          with a probability of at most 1/40, whatever the weights are;
        - up to m + s^2 / 2 + sqrt(t^2 s^2 / K + (s^2 / 2)^2 ((K - 1) / c - 1)^2) at least, where K is less than
          100. This is the limit for the mean of log-normal weights, with the mean m and the variance s^2 of
          their logarithms, and c the 2.5 % quantile of chi^2 with K - 1 degrees of freedom. Weights of chains
          of many steps are nearly log-normal. For larger K, k-hat says whether the standard error will do.

        It is (log_evidence - log 40, inf) for one particle.

        Source: Confidence interval estimation for lognormal data with application to health economics, Zou,
        Taleban & Huang, 2009, https://doi.org/10.1016/j.csda.2009.03.016, there with a normal quantile for t.
        """
        from scipy.special import chdtri, stdtrit

        k, t = self.particles, float(stdtrit(self.particles - 1, 1 - MISSED / 2))
        reach = t * self.error
        upper = self.log_evidence + reach
        if k < pareto.FEWEST_WEIGHTS:
            half, skew = self.variance / 2, (k - 1) / float(chdtri(k - 1, 1 - MISSED / 2)) - 1
            spread = (t**2 * self.variance / k + (half * skew) ** 2).sqrt()
            upper = upper.maximum(self.bound + half + spread)
        lower = self.log_evidence - reach.nan_to_num(nan=math.inf).clamp(max=math.log(2 / MISSED))
        return lower, upper.nan_to_num(nan=math.inf)

    @property
    def reliable(self) -> Bool[Tensor, " N"]:
        """Whether the weights look even enough to trust log_evidence and its error.

        The effective sample size must be at least 10, or half of the particles if that is less. With 100
        particles or more, k-hat must be at most min(1 - 1 / log10(K), 0.7). One particle is never reliable.
        """
        even = self.effective_sample_size >= min(POOR, self.particles / 2)
        if self.particles < pareto.FEWEST_WEIGHTS:
            return even & (self.particles > 1)
        return even & (self.pareto_k <= pareto.threshold(self.particles))


class Tally:
    """Sums over particles that come a few at a time, and the largest weights, in float64."""

    def __init__(self, x: Shaped[Tensor, "N E"], particles: int):
        zeros = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.log_sum, self.log_squares = zeros - math.inf, zeros - math.inf
        self.sum_log, self.sum_log_squares, self.sum_lik = zeros.clone(), zeros.clone(), zeros.clone()
        kept = pareto.tail_length(particles) + 1 if particles >= pareto.FEWEST_WEIGHTS else 0
        self.particles, self.largest = particles, zeros.new_full((kept, len(x)), -math.inf)

    def add(
        self, rows: slice | Tensor, log_weight: Float[Tensor, "K B"], log_lik: Float[Tensor, "K B"]
    ) -> None:
        """Adds particles of the images at these rows."""
        log_weight = log_weight.double()
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], log_weight.logsumexp(0))
        self.log_squares[rows] = torch.logaddexp(self.log_squares[rows], (2 * log_weight).logsumexp(0))
        self.sum_log[rows] += log_weight.sum(0)
        self.sum_log_squares[rows] += log_weight.square().sum(0)
        self.sum_lik[rows] += log_lik.double().sum(0)
        if kept := len(self.largest):
            self.largest[:, rows] = torch.cat([self.largest[:, rows], log_weight]).topk(kept, dim=0).values

    def result(self) -> Evidence:
        """The evidence of all images, once every one has its K particles."""
        k, mean = self.particles, self.sum_log / self.particles
        found = {
            "log_evidence": self.log_sum - math.log(k),
            "effective_sample_size": (2 * self.log_sum - self.log_squares).exp(),
            "bound": mean,
            "variance": (self.sum_log_squares - k * mean**2).clamp(min=0) / (k - 1),
            "log_lik": self.sum_lik / k,
            "pareto_k": pareto.k_hat(self.largest)
            if len(self.largest)
            else mean.new_full(mean.shape, math.nan),
        }
        return Evidence(**{name: value.cpu() for name, value in found.items()}, particles=k)
