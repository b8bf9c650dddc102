"""Instruction records: readers, converters, synthesis. Imports no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bioinstruct.synth.batching import batch
    from bioinstruct.synth.generation import generate

__all__ = ["batch", "generate"]


def __getattr__(name: str) -> Any:
    """Import the engine only for those who ask for it: every command imports this package."""
    if name == "generate":
        from bioinstruct.synth.generation import generate

        return generate
    if name == "batch":
        from bioinstruct.synth.batching import batch

        return batch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
