# GPT: the same blocks, causal, one token after another; no noise and no times.
# One of four systems of equal size, on tiny Shakespeare by characters:
# python prepare.py shakespeare_char && python train.py config/gpt.py
dataset = "shakespeare_char"
out_dir = "out/gpt"

parameterization = "causal"
n_layer, n_head, n_embd = 4, 3, 192
block_size = 128
batch_size = 32
max_steps = 2400
learning_rate = 2e-3
eval_interval = 200
log_interval = 50
