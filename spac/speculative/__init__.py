"""Speculative decoding: who proposes tokens (`draft.py`), how many are verified (`draft_length.py`), and the loop over both.

Importing this loads llama_cpp and libspac.
"""

from spac.speculative.draft import DRAFT_UBATCH, Acceptance, Draft, DraftLlama, ForeignDraft, ModelDraft, NgramDraft, Proposal
from spac.speculative.loop import DraftStats, Speculation

__all__ = [
    "DRAFT_UBATCH",
    "Acceptance",
    "Draft",
    "DraftLlama",
    "DraftStats",
    "ForeignDraft",
    "ModelDraft",
    "NgramDraft",
    "Proposal",
    "Speculation",
]
