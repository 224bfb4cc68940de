# The bound over the validation split of WikiText-2, in GPT-2's tokens.
# python train.py config/eval_wikitext2.py --init_from=louaaron/sedd-small
dataset = "wikitext2"
eval_only = True
eval_split = "val"  # as the loaders of the paper do; LAMBADA and LM1B have no such split
eval_sequences = 0  # all
eval_times = 32
block_size = 1024
