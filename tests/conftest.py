"One thread for every test: a forked child must not wait for threads that stayed behind in its parent."
import torch

torch.set_num_threads(1)
