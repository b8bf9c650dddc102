"""A guard against sending data of patients: patterns of identifiers in the seeds a user brings.

It finds names with a title, dates of birth, record and social security numbers, telephone numbers
and mail addresses as they are usually written. It is no de-identification and no guarantee.
"""

import re
from collections.abc import Sequence

from bioinstruct.synth.seeds import Seed

PATTERNS = {
    "a name with a title": r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\.?\s+[A-Z][a-z]+",
    "a date of birth": r"(?i)\b(?:dob|date of birth|born(?: on)?)\W{1,3}\d+[-/. ]\w+[-/. ]\d+",
    "a record number": r"(?i)\b(?:mrn|(?:medical )?record (?:number|no))\W{0,4}\d{4,}",
    "a social security number": r"\b\d{3}-\d{2}-\d{4}\b",
    "a telephone number": r"(?<![\d.])(?:\+\d{1,3}[ .-]?)?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b",
    "a mail address": r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}
SHOWN = 3  # findings spelled out


def refuse_identifiers(seeds: Sequence[Seed]) -> None:
    """Refuse seeds in which something looks like a person's identifier.

    Raises:
        ValueError: with the places and kinds, and without the text itself.
    """
    found = [
        f"{record.where}: {name} in {field!r}"
        for _, record in seeds
        for field in ("instruction", "input", "output")
        for name, pattern in _COMPILED.items()
        if pattern.search(getattr(record, field))
    ]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"seeds look as if they identify persons: {'; '.join(found[:SHOWN])}{more}; a remote "
            "endpoint would see them: remove them, or pass --allow-phi-like if they are invented"
        )
