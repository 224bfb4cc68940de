# SEDD Uniform: scores, and noise that replaces a token by a random one.
# One of four systems of equal size, on tiny Shakespeare by characters:
# python prepare.py shakespeare_char && python train.py config/uniform.py
from config.absorb import *

out_dir = "out/uniform"
graph = "uniform"
