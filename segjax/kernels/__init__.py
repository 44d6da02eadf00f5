"""Functions of arrays, each with a plain implementation and faster ones that are proven equal to it.

They import nothing else of segjax.
"""
