"""What a sequence costs to train on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceCost:
    """FLOPs of forward and backward over one sequence, as `linear * length + quadratic * length**2`."""

    linear: float
    quadratic: float

    def __call__(self, length: int) -> float:
        return self.linear * length + self.quadratic * length * length

    @classmethod
    def of_transformer(
        cls, *, active_parameters: float, num_layers: int, num_heads: int, qk_head_dim: int, v_head_dim: int
    ) -> "SequenceCost":
        """The cost for a causal transformer; the backward pass costs twice the forward pass.

        Linear: 2 FLOPs a forward pass for each parameter that a token meets, the output head included. Quadratic:
        scores and their weighted sum, half of the square being masked (PaLM: arXiv:2204.02311, appendix B, halved).
        """
        return cls(linear=6 * active_parameters, quadratic=3 * num_layers * num_heads * (qk_head_dim + v_head_dim))
