"""Reports: one page, CSV and LaTeX of one run or of several side by side; a table for the terminal."""

from jaxcl.report.write import report

__all__ = ["report"]
