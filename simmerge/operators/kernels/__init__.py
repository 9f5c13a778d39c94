"""Kernels: the arithmetic of every operator, as functions of `Operands` and coefficients.

A kernel looks at whole tensors only through statistics (Gram matrices, selected magnitudes, norms), which
do not depend on the coefficients and are remembered with the operands, and returns a `Plan`: what to do with
any one block. So the same kernel streams from disk in bounded memory and re-runs in memory in one pass.
"""
