# The bound over the validation split of WikiText-103, in GPT-2's tokens.
# python train.py config/eval_wikitext103.py --init_from=louaaron/sedd-small
from config.eval_wikitext2 import *

dataset = "wikitext103"
