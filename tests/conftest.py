"""The tensors of these tests are small: a second thread gains little, and on a shared machine costs a lot."""

import torch

torch.set_num_threads(1)
