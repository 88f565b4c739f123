"""The features of a bar: the compiled kernel, the state of all series, and windows of vectors.

`kernel` is the one definition, `bank` keeps and stores the state, `windows` collects the last
vectors for models that read a sequence, `packing` is the form in which both are stored.
"""
