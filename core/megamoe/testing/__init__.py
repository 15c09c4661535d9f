"""What proves a variant: cases, comparison, and a pytest plugin that runs over whatever the plugins declare."""

import torch

# MKL sets a vector function up in its first call. Where threads share that call, one of them may compute its part with
# a coarser version: exp off by 1e-4, in one process of a thousand. Cases are loaded before any reference is called, so
# here the first calls are made, of one value each.
for _function in (torch.exp, torch.log, torch.sin, torch.cos, torch.tanh, torch.erf):
    _function(torch.ones(1, dtype=torch.float32, device="cpu"))
