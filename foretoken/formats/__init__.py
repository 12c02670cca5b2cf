"""Outside formats, one file each: what our names and shapes are called there."""
