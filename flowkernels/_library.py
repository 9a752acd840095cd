"""The torch.library handle that every op defines its schema on."""

import torch

library = torch.library.Library("flowkernels", "FRAGMENT")
