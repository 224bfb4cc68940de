# The bound over the test split of LAMBADA, in GPT-2's tokens.
# python train.py config/eval_lambada.py --init_from=louaaron/sedd-small
from config.eval_wikitext2 import *

dataset = "lambada"
eval_split = "test"
