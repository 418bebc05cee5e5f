"""What every part of the parity program returns."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Check:
    """One recorded value compared with ours."""

    name: str
    max_error: float
    ok: bool
    detail: str = ""


def compare(name: str, got: torch.Tensor, want: torch.Tensor, atol: float = 0.0, rtol: float = 0.0) -> Check:
    """Checks |got - want| <= atol + rtol |want| for every element; values that are not finite must be equal."""
    if got.shape != want.shape:
        return Check(name, float("inf"), False, f"shape {tuple(got.shape)}, recorded {tuple(want.shape)}")
    if not want.numel():
        return Check(name, 0.0, True, "empty")
    got, want = got.detach().cpu().to(torch.float64), want.detach().cpu().to(torch.float64)
    error = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(nan=float("inf"))
    error = error.masked_fill(got.isnan() & want.isnan(), 0.0)
    missed = error > atol + rtol * want.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    detail = f"{int(missed.sum())} of {missed.numel()} elements miss" if missed.any() else ""
    return Check(name, float(error.max()), not missed.any(), detail)


def compare_values(name: str, got: object, want: object) -> Check:
    """Checks that two plain Python values are equal."""
    ok = got == want
    return Check(name, 0.0 if ok else float("inf"), ok, "" if ok else f"got {got!r}, recorded {want!r}"[:300])
