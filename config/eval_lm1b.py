# The bound over the test split of the One Billion Word benchmark, in GPT-2's tokens.
# python train.py config/eval_lm1b.py --init_from=louaaron/sedd-small
from config.eval_wikitext2 import *

dataset = "lm1b"
eval_split = "test"
