"""Coefficient tables of Newton-Schulz, by name."""

from __future__ import annotations

from collections.abc import Sequence

Triple = tuple[float, float, float]
Table = tuple[Triple, ...]

MAX_STEPS = 99  # torch.optim.Muon's limit


def _with_safety(table: Sequence[Triple], s: float) -> Table:
    """The table for inputs whose spectral norm may exceed 1 by the factor `s`: a/s, b/s^3, c/s^5."""
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in table)


_KELLER = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: dict[str, Table] = {
    "quintic": (_KELLER,) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": _with_safety(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        ),
        1.01,
    ),
    "cans": _with_safety(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        1.01,
    ),
    "deepseek_v4": (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
"""Tables of (a, b, c) per step, by name.

quintic: Keller Jordan's, the default of torch.optim.Muon and of the Moonlight report. you: Jiacheng You's
(Emerging-Optimizers calls it "quintic"). polar_express: the first five of arXiv 2505.16932, with a safety factor
of 1.01 applied to every step as a/s, b/s^3, c/s^5; tables of this name with 1.02 or 1.05 exist elsewhere.
cans: arXiv 2506.10935, with the same 1.01: as published, each step lands on the very edge of the next one's
interval, and the rounding of 16 bits carries it over (rank-1 matrices overflow). With that factor singular values
from 1e-3 to 1 come out within 0.857 to 1.113 (0.884 to 1.120 as published). deepseek_v4: eight quintic
steps, then two that pull the values to 1.
"""


def coefficient_table(coefficients: str | Triple | Sequence[Triple], steps: int | None) -> Table:
    """The (a, b, c) of every step.

    Args:
        coefficients: a name in COEFFICIENTS, one (a, b, c) for all steps as torch.optim.Muon takes it, or one
            per step.
        steps: how many; the last triple repeats where the table is shorter. None: the table as it is.

    Raises:
        ValueError: for an unknown name, something that is not triples, or steps outside 1 to 99.
    """
    known = f"give one of {', '.join(COEFFICIENTS)}, one (a, b, c), or one (a, b, c) per step"
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"ns_coefficients={coefficients!r} is no known table: {known}")
        table = COEFFICIENTS[coefficients]
    else:
        try:
            rows = list(coefficients)
            rows = rows if all(hasattr(row, "__len__") for row in rows) else [rows]
            table = tuple((float(a), float(b), float(c)) for a, b, c in rows)
        except (TypeError, ValueError):
            raise ValueError(f"ns_coefficients={coefficients!r} are no triples: {known}") from None
        if not table:
            raise ValueError(f"ns_coefficients is empty: {known}")
    steps = len(table) if steps is None else steps
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"ns_steps={steps!r} must be an integer from 1 to {MAX_STEPS}")
    return (table + table[-1:] * (steps - len(table)))[:steps]
