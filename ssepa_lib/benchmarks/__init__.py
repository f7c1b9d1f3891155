"""Measuring: nothing in the library imports this folder.

In come a device and a size; out come rows with speed and memory as ratios within one call
(`bench.run_suites`), checks and short runs on a GPU (`gpu.run_gpu`), and the weights of the built-in ViT
(`pretrain_shapes.pretrain`).
"""
