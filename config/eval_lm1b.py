# The bound over the test split of the One Billion Word benchmark, in GPT-2's tokens.
# python train.py config/eval_lm1b.py --init_from=louaaron/sedd-small
dataset = "lm1b"
eval_only = True
eval_split = "test"
eval_sequences = 0  # all
eval_times = 32
block_size = 1024
