"""The five diagrams of the method, drawn by code with the numbers of a run in the place of its letters."""

from ssepa_lib.workbook.diagrams.overview import pipeline
from ssepa_lib.workbook.diagrams.sizes import Shapes

__all__ = ["Shapes", "pipeline"]
