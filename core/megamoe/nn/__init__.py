"""Layers that compose the ops: experts, attention output, hyper-connections, attention.

Each takes NVFP4 weights, and then runs the ops that configuration and evidence choose; or plain tensors, and then runs
the same steps without quantisation: the exact mode, which equals the model's own code.
"""
