# GPT: the same blocks, causal, one token after another; no noise and no times.
# One of four systems of equal size, on tiny Shakespeare by characters:
# python prepare.py shakespeare_char && python train.py config/gpt.py
from config.absorb import *

out_dir = "out/gpt"
parameterization = "causal"
learning_rate = 2.4e-2
