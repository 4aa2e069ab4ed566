"""The error of everything that reads or writes a corpus."""


class CorpusError(Exception):
    """A corpus is damaged, disagrees with the reference, or cannot be made; the text is one sentence."""
