"""Clipping to an L2 ball, and what happens to values that are not finite.

factor = min(1, C·(1 − 1e-6)/norm): the margin keeps the float32 result inside the ball of radius C·(1 + 1e-5).
"""

from __future__ import annotations

import torch

from fedray.errors import InputError
from fedray.privacy.constants import constant
from fedray.privacy.shapes import Clipping, FixedClipping

_FIXED = FixedClipping()
_MARGIN = 1e-6
LARGEST_NORM = 1e18  # the square of a larger one overflows float32
_SHORTEST = 1e-30
_BLOCK = 1024  # values whose squares are added in float32, on eight lanes at least


def clip_factors(
    norms: torch.Tensor, clip_norm: float, *, all_usable: bool = False, rule: Clipping = _FIXED
) -> torch.Tensor:
    """Return the factors that bring vectors of these norms into the ball of radius C (Abadi et al. 2016, Algorithm 1).

    Args:
        norms: L2 norms, any shape, float32 or float64.
        clip_norm: C > 0.
        all_usable: Whether the caller has seen that every norm is usable, which spares some calls; `norms` are float32.
        rule: What asks for a factor, from one norm at a time.

    Returns:
        Factors ≥ 0, the shape of `norms`, float32; at most 1 by the usual rule.

    Guarantee:
        ‖factor · v‖ ≤ C·(1 + 1e-5) for every v with this norm, so a released sum moves by at most C when one vector is
        added or removed.

    Edge cases:
        A zero norm gives factor 1. A norm that is NaN, infinite or above 1e18 gives factor 0: whoever multiplies must
        select the vector out as well (0 · NaN is NaN), see `select_finite`.
    """
    factors = torch.div(constant(clip_norm * (1.0 - _MARGIN)), norms)
    factors = factors.clamp_(max=1.0) if isinstance(rule, FixedClipping) else _asked(rule, norms, clip_norm, factors)
    if all_usable:
        return factors
    return torch.where(usable(norms), factors, constant(0.0)).to(torch.float32)


def check_clipping(rule: Clipping, name: str) -> None:
    """Try a rule of clipping on a few norms.

    Args:
        rule: To try.
        name: The value of --clip.

    Raises:
        InputError: It raises: it must give one norm's factor by itself, without draws.
    """
    try:
        clip_factors(torch.tensor([0.0, 0.5, 2.0]), 1.0, rule=rule)
    except Exception as error:  # a user's rule may raise anything
        raise InputError(
            f"--clip {name}: factor(norm, clip_norm) raised {type(error).__name__}: {error}; it must return the factor of one "
            "vector from its norm, a tensor of one number, without draws."
        ) from error


def _asked(rule: Clipping, norms: torch.Tensor, clip_norm: float, longest: torch.Tensor) -> torch.Tensor:
    """Return the factors that a rule asks for, none above `longest`; what is negative or no number counts as zero."""

    def alone(norm: torch.Tensor) -> torch.Tensor:
        return rule.factor(norm, clip_norm).to(norm.dtype)

    with torch.inference_mode(False):
        asked = torch.func.vmap(alone)(norms.detach().clone().flatten()).view(norms.shape)
    good = (asked >= 0) & torch.isfinite(asked)
    return torch.where(good, torch.minimum(asked, longest), constant(0.0).to(norms.dtype))


def usable(norms: torch.Tensor) -> torch.Tensor:
    """Tell which norms are numbers of at most 1e18; what is not counts as zero."""
    return norms <= constant(LARGEST_NORM)  # false for NaN


def factors_of_products(lengths: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return the factors of gradients e aᵀ of which only e is multiplied, 0 where float32 would lose what counts.

    Below 1e-38 float32 has few digits, and an input a of 1e35 brings their rounding back: the sum would be longer than C.
    From 1e-30 on, what is lost is less than 1e-15 of C for each value of e.

    Args:
        lengths: ‖e‖, any shape.
        factors: Of clipping, the same shape.
    """
    lost = (factors < 1.0) & (lengths * factors < _SHORTEST)
    return torch.where(lost, constant(0.0), factors)


def selected(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return `values` with zeros outside of `keep`, laid out as they are: sums must not take another kernel for others' sake.

    Args:
        values: `[G, B, …]`.
        keep: `[G, B]`.
    """
    found = torch.empty_like(values)
    torch.where(keep.view(*keep.shape, *([1] * (values.dim() - keep.dim()))), values, constant(0.0), out=found)
    return found


def select_finite(values: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return `values` with the rows of non-finite norm replaced by zeros.

    Args:
        values: `[n, …]`, one vector a row.
        norms: `[n]`.
    """
    return selected(values, usable(norms))


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms of float32 vectors, each to within a share of 4e-6, four times as fast as float64 throughout.

    Args:
        rows: `[…, P]`.

    Returns:
        `[…]`, float32: blocks of squares are added in float32, blocks in float64, so that the 10^8 coordinates of a
        large model lose no digits.

    Edge cases:
        A norm above `LARGEST_NORM` may come out infinite. Values below 1e-22, whose squares float32 cannot hold, are lost;
        10^8 of them have a squared norm of 1e-36, nothing beside the square of the smallest C, 1e-30.
    """
    norms: torch.Tensor
    size = rows.shape[-1]
    if size <= _BLOCK:
        norms = torch.linalg.vector_norm(rows, dim=-1)
        return norms
    whole = size // _BLOCK * _BLOCK
    blocks = rows[..., :whole].view(*rows.shape[:-1], whole // _BLOCK, _BLOCK)
    parts = [torch.linalg.vector_norm(blocks, dim=-1)]
    if whole < size:
        parts.append(torch.linalg.vector_norm(rows[..., whole:], dim=-1, keepdim=True))
    norms = torch.linalg.vector_norm(torch.cat(parts, -1), dim=-1, dtype=torch.float64)
    return norms.float()


def clip_rows(rows: torch.Tensor, clip_norm: float, rule: Clipping = _FIXED) -> torch.Tensor:
    """Clip each row of a matrix to L2 norm C; a row whose norm is not finite becomes zero.

    Args:
        rows: `[n, P]` float32.
        clip_norm: C > 0.
        rule: See `clip_factors`.

    Returns:
        `[n, P]`, each row of norm at most C·(1 + 1e-5).
    """
    norms = row_norms(rows)
    return select_finite(rows, norms) * clip_factors(norms, clip_norm, rule=rule).unsqueeze(1)
