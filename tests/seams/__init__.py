"""Each seam is filled from outside the package."""
