"""The five diagrams of the method, drawn by code with the numbers of a run instead of its letters.

White is data, blue is learned, grey is fixed, orange is the teacher. A solid arrow is a way on which a
gradient flows back; on a dashed one it is stopped; a zigzag is an argmax, which has none.
"""

from ssepa_lib.workbook.diagrams.attention import affinity_extraction, haaf
from ssepa_lib.workbook.diagrams.overview import pipeline, you_are_here
from ssepa_lib.workbook.diagrams.reinforcement import self_reinforcement
from ssepa_lib.workbook.diagrams.sizes import Shapes
from ssepa_lib.workbook.diagrams.storage import memory

__all__ = [
    "Shapes",
    "affinity_extraction",
    "haaf",
    "memory",
    "pipeline",
    "self_reinforcement",
    "you_are_here",
]
