# The bound over the test split of the Penn Treebank, in GPT-2's tokens.
# python train.py config/eval_ptb.py --init_from=louaaron/sedd-small
dataset = "ptb"
eval_only = True
eval_split = "test"
eval_sequences = 0  # all
eval_times = 32
block_size = 1024
