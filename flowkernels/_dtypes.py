"""The dtypes that ops take."""

import torch

HALF = (torch.float16, torch.bfloat16)  # computed in float32
FLOATING = frozenset((torch.float64, torch.float32, *HALF))
