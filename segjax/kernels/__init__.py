"""Functions of arrays, each with a plain implementation and faster ones that tests prove equal to it.

They import nothing else from segjax.
"""
