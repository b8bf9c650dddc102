"""The LLaMA model: configuration, weights, tokenizers, templates, generation.

`load` and `Llm` are imported on first use, so that the parts that need no torch stay light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bioinstruct.model.llm import Answer, Llm, load

__all__ = ["Answer", "Llm", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import bioinstruct.model.llm

    return getattr(bioinstruct.model.llm, name)
