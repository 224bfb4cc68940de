# D3PM in continuous time, here MDLM: means instead of scores, and noise that masks.
# One of four systems of equal size, on tiny Shakespeare by characters:
# python prepare.py shakespeare_char && python train.py config/d3pm.py
from config.absorb import *

out_dir = "out/d3pm"
parameterization = "mean"
