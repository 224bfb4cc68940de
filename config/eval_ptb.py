# The bound over the validation split of the Penn Treebank, in GPT-2's tokens.
# python train.py config/eval_ptb.py --init_from=louaaron/sedd-small
from config.eval_wikitext2 import *

dataset = "ptb"
