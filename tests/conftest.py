"""What every test shares: one thread, so that two test processes do not fight over two cores."""

import torch

torch.set_num_threads(1)
