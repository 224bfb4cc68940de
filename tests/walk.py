"""A graph of another kind: where a token goes depends on where it is. It overrides all that follows from `pi`."""

import torch

from sedd import Graph


class Walk(Graph):
    """A token steps to the next one of the vocabulary at rate 1 and to the one before at rate 1/2; first and last are
    neighbours. As in Uniform, it also goes anywhere at rate 1: steps alone would take thousands to forget their start.
    """

    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.rates = torch.full((vocab_size,), 1 / vocab_size, dtype=torch.float64)  # of a move by 0, 1, ... places
        self.rates[1] += 1
        self.rates[-1] += 1 / 2
        self.rates[0] -= self.rates.sum()

    def rate_matrix(self):
        places = torch.arange(self.num_states)
        return self.rates[places[:, None] - places]

    def spectrum(self, sigma):
        """exp(sigma Q) in Fourier space, where this matrix is diagonal: sigma (...) -> (..., N)."""
        return torch.exp(sigma.double()[..., None] * torch.fft.fft(self.rates.to(sigma.device)))

    def moves(self, sigma):
        """The chances of having moved by 0, 1, ... places: sigma (...) -> (..., N)."""
        return torch.fft.ifft(self.spectrum(sigma)).real.clamp(min=1e-30)  # rounding can leave less than nothing

    def pick(self, values, distance):
        """values (..., N) of each move, distance (..., K) in places -> (..., K)."""
        distance = distance % self.num_states
        return values.to(distance.device).expand(*distance.shape[:-1], self.num_states).gather(-1, distance)

    def to_all(self, x):
        """How far it is from x (...) to each state: (..., N)."""
        return torch.arange(self.num_states, device=x.device) - x[..., None]

    def can_change(self, x):
        return torch.ones_like(x, dtype=torch.bool)

    def sample_transition(self, x0, sigma, generator=None):
        moves = self.moves(sigma).expand(*x0.shape, self.num_states)
        moved = torch.multinomial(moves.reshape(-1, self.num_states), 1, generator=generator).view(x0.shape)
        return (x0 + moved) % self.num_states

    def sample_prior(self, *shape, device=None, generator=None):
        return torch.randint(self.num_states, shape, device=device, generator=generator)

    def prior_kl(self, sigma, x0):
        p = self.moves(sigma)
        return torch.xlogy(p, p * self.num_states).sum(-1).to(sigma.dtype).expand(x0.shape)

    def score_entropy(self, log_score, sigma, x, x0):
        moves, rate = self.moves(sigma), self.pick(self.rates, -self.to_all(x))
        r = self.pick(moves, self.to_all(x0)) / self.pick(moves, (x - x0)[..., None])  # p(y | x0) / p(x | x0)
        entropy = rate * (log_score.exp() - r * log_score + r * (r.log() - 1))
        return entropy.scatter(-1, x[..., None], 0.0).sum(-1).to(log_score.dtype)

    def reverse_rate(self, score, x):
        rate = self.pick(self.rates, -self.to_all(x)).to(score.dtype) * score
        rate = rate.scatter(-1, x[..., None], 0.0)
        return rate.scatter(-1, x[..., None], -rate.sum(-1, keepdim=True))

    def tweedie_probs(self, score, delta, x):
        before = torch.fft.ifft(torch.fft.fft(score.double()) * self.spectrum(-delta)).real.clamp(min=0)
        probs = before * self.pick(self.moves(delta), -self.to_all(x))
        return (probs / probs.sum(-1, keepdim=True)).to(score.dtype)
