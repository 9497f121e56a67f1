"""Self-tuning: hyperparameters that move during the run, by the gradient of a held-out loss through a best response.

MacKay et al. 2019, "Self-Tuning Networks" (arXiv 1903.03088). Training steps perturb the hyperparameters, so that the
model learns how its weights should respond to them: here the response is a gate on every hidden unit of the
feed-forwards, `2 sigmoid(V (u - u_0) + c)`, with u the hyperparameters in unconstrained space and u_0 where they began;
for a linear model under a penalty such gates are the exact response (section 3.2). Held-out steps then move u by the
gradient that comes through the gates, and the spread of the perturbations by the same gradient and an entropy term. At
the beginning V and c are zero, so that the model is the one without self-tuning.

Perturbations hang on the clock alone: a step draws the same on every rank and in every micro-batch.

Letters: H hyperparameters, L layers, E experts, F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn

from tidegate.config import Config
from tidegate.model.clock import Clock, derive_key, uniform
from tidegate.model.initialisation import Draw
from tidegate.model.layers import Fp32Buffers

__all__ = ["BestResponse", "Hyperparameter", "Response", "SelfTuneConfig", "Tuned"]

Hyperparameter = Literal["balance_scale", "temperature", "noise", "dropout"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_LOG_SPREAD = (-4.0, 1.0)
"""Of the perturbations: below, the response is not learned; above, it is no longer local."""


class SelfTuneConfig(Config):
    tuned: dict[Hyperparameter, float] = Field(min_length=1)
    """What moves, and where it begins. `balance_scale`: factor of `balance.loss_weight`. `temperature`: divides the
    router's logits. `noise`: deviation of Gaussian noise on them in training. `dropout`: share of each feed-forward's
    output that training drops."""
    every: int = Field(default=2, ge=1)
    """A held-out step after so many training steps; it costs about as much as one."""
    rate: float = Field(default=0.01, gt=0)
    """Adam's step of each hyperparameter, in its logarithm (dropout: logit)."""
    spread: float = Field(default=0.3, gt=0, le=2)
    """First standard deviation of the perturbations, in the same unit; it is tuned too."""
    entropy: float = Field(default=1e-4, ge=0)
    """Weight of the perturbations' entropy, which keeps them from vanishing."""
    warmup_tokens: int = Field(default=0, ge=0)
    """Hyperparameters stand still before; perturbed they are from the first step."""
    response: float = Field(default=10.0, gt=0)
    """Factor of V: AdamW moves a parameter by about the learning rate a step, too slow for a gate."""

    @model_validator(mode="after")
    def _in_range(self) -> SelfTuneConfig:
        for name, start in self.tuned.items():
            if not 0 < start < (1 if name == "dropout" else math.inf):
                limit = "between 0 and 1" if name == "dropout" else "above 0"
                raise ValueError(f"tuned.{name}={start} must begin {limit}: it moves in its logarithm or logit")
        return self

    def build(self, shapes: Mapping[str, tuple[int, ...]]) -> BestResponse:
        """Gates of these shapes for the hyperparameters in their order."""
        start = [math.log(v / (1 - v)) if name == "dropout" else math.log(v) for name, v in self.tuned.items()]
        return BestResponse(start, shapes, self.spread, self.response, self.rate, self.entropy)

    def values(self, point_H: torch.Tensor) -> Tuned:
        """The hyperparameters at a point of the unconstrained space."""
        pairs = zip(self.tuned, point_H.unbind(), strict=True)
        return Tuned(**{name: u.sigmoid() if name == "dropout" else u.exp() for name, u in pairs})


class Tuned(NamedTuple):
    """Scalars, fp32; None where nothing is tuned."""

    balance_scale: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    dropout: torch.Tensor | None = None


class Response(NamedTuple):
    """What a forward pass gets."""

    point_H: torch.Tensor
    """(H,) fp32 unconstrained hyperparameters."""
    gates: dict[str, torch.Tensor]
    """fp32, by name, of the shapes that were asked for."""


class BestResponse(Fp32Buffers):
    """Hyperparameters, and gates that respond to them.

    Where the hyperparameters are, how far they are perturbed and the moments of their Adam are buffers: the same on
    every rank, and in every checkpoint.

    Args:
        start: (H) unconstrained hyperparameters at the beginning.
        shapes: of the gates, by name.
        spread: first standard deviation of the perturbations.
        response: factor of the trained V.
        rate: Adam's step.
        entropy: weight of the perturbations' entropy.
    """

    location: torch.Tensor
    log_spread: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    moves: torch.Tensor

    def __init__(
        self,
        start: Sequence[float],
        shapes: Mapping[str, tuple[int, ...]],
        spread: float,
        response: float,
        rate: float,
        entropy: float,
    ) -> None:
        super().__init__()
        self.start, self._spread, self._response = tuple(start), spread, response
        self._rate, self._entropy = rate, entropy
        num = len(self.start)
        self.response = nn.ParameterDict({name: torch.empty(*shape, num + 1) for name, shape in shapes.items()})
        for name, size in (("location", (num,)), ("log_spread", (num,)), ("mean", (2, num)), ("square", (2, num))):
            self.register_buffer(name, torch.empty(size, dtype=torch.float32))
        self.register_buffer("moves", torch.empty((), dtype=torch.float32))

    def init_weights(self, draw: Draw) -> None:
        with torch.no_grad():
            for parameter in self.response.values():
                parameter.zero_()
            self.location.copy_(torch.tensor(self.start))
            self.log_spread.fill_(math.log(self._spread))
            for buffer in (self.mean, self.square, self.moves):
                buffer.zero_()

    def forward(self, clock: Clock) -> Response:
        """Perturbed in a step: without gradient to the hyperparameters in training, with it while `listening`. As they
        are outside of steps."""
        point_H = self.location
        if clock.step > 0 and (self.training or self.location.requires_grad):
            rows = torch.arange(len(point_H), device=point_H.device)
            normal_H = torch.special.ndtri(uniform(rows, 1, clock.key ^ derive_key("self-tuning"))[:, 0])
            point_H = point_H + self.log_spread.exp() * normal_H
        away = torch.cat([point_H - point_H.new_tensor(self.start), point_H.new_ones(1)])
        # V and c are what was learned, near 0, where bf16 tells neighbours apart.
        gates = {name: 2 * (self._response * (v.float() @ away)).sigmoid() for name, v in self.response.items()}
        return Response(point_H, gates)

    @contextmanager
    def listening(self) -> Iterator[list[torch.Tensor]]:
        """Within, a pass carries gradient to the hyperparameters and the spread, the two tensors this gives."""
        heard = [self.location, self.log_spread]
        for tensor in heard:
            tensor.requires_grad_(True)
        try:
            yield heard
        finally:
            for tensor in heard:
                tensor.requires_grad_(False)

    @torch.no_grad()
    def move(self, gradients: Sequence[torch.Tensor]) -> None:
        """One step of Adam by the held-out loss, (H,) of the hyperparameters and of the logarithm of their spread."""
        gradient_2H = torch.stack([*gradients])
        gradient_2H[1] -= self._entropy  # the entropy of a normal is its log deviation, but for a constant
        if not bool(gradient_2H.isfinite().all()):  # a host sync, once a held-out step
            return
        first, second = _BETAS
        self.moves += 1
        self.mean.lerp_(gradient_2H, 1 - first)
        self.square.lerp_(gradient_2H.square(), 1 - second)
        mean_2H, square_2H = self.mean / (1 - first**self.moves), self.square / (1 - second**self.moves)
        step_2H = self._rate * mean_2H / (square_2H.sqrt() + _EPS)
        self.location -= step_2H[0]
        self.log_spread.sub_(step_2H[1]).clamp_(*_LOG_SPREAD)
