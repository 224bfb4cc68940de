# The bound over the test split of WikiText-103, in GPT-2's tokens.
# python train.py config/eval_wikitext103.py --init_from=louaaron/sedd-small
dataset = "wikitext103"
eval_only = True
eval_split = "test"
eval_sequences = 0  # all
eval_times = 32
block_size = 1024
