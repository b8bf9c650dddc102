"""Money that is never overspent: integer amounts, reservations before sending, a hard cap.

Amounts are integers of picodollars (1e-12 USD), so sums are exact and prices of six decimals per
million tokens are held exactly. Before a request is sent its worst case is reserved,

    (UTF-8 bytes of the body + 64) x price-in + output cap x price-out,

which no honest bill exceeds, since a token is at least one byte. The answer's `usage` settles it.
What is charged plus what is reserved never passes the cap, so neither does the bill.
"""

from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple

PICO = 10**12
BODY_EXTRA_TOKENS = 64  # the chat format's own tokens around the messages


class Usage(NamedTuple):
    """Tokens that an answer was billed for; hidden reasoning counts as completion."""

    prompt_tokens: int
    completion_tokens: int


class Prices(NamedTuple):
    """Picodollars per token."""

    input_pico: int
    output_pico: int

    def cost(self, usage: Usage) -> int:
        """Return what an answer costs; cached tokens are taken at the full price."""
        prompt, completion = usage
        return prompt * self.input_pico + completion * self.output_pico

    def worst(self, body_bytes: int, cap_tokens: int) -> int:
        """Return the most that a request can cost."""
        return (body_bytes + BODY_EXTRA_TOKENS) * self.input_pico + cap_tokens * self.output_pico


def per_token(usd_per_million: float) -> int:
    """Return a price in picodollars per token, rounded up."""
    exact = Decimal(str(usd_per_million)) * (PICO // 10**6)
    return int(exact.to_integral_value(rounding=ROUND_CEILING))


def from_usd(usd: float) -> int:
    """Return an amount in picodollars, rounded to the nearest."""
    return int((Decimal(str(usd)) * PICO).to_integral_value())


def shown(pico: int) -> str:
    """Return an amount in dollars, to four decimals."""
    return f"${pico / PICO:,.4f}"


class Ledger:
    """What a run was charged, what it has reserved, and the cap on both together.

    Args:
        cap: picodollars, or None for no cap.
        charged: what earlier invocations were charged, reservations never settled included.
    """

    def __init__(self, cap: int | None, charged: int = 0) -> None:
        self.cap, self.charged, self.reserved = cap, charged, 0

    def fits(self, amount: int) -> bool:
        """Whether amount more can be reserved."""
        return self.cap is None or self.charged + self.reserved + amount <= self.cap

    def reserve(self, amount: int) -> None:
        """Set amount aside; it must fit."""
        assert self.fits(amount)
        self.reserved += amount

    def settle(self, reserved: int, charge: int) -> None:
        """Replace a reservation by what is charged for it."""
        self.reserved -= reserved
        self.charged += charge
