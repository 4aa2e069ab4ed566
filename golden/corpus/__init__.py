"""The files of the corpus: written, read, compared, regenerated."""
