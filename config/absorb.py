# SEDD Absorb: scores, and noise that masks.
# One of four systems of equal size, on tiny Shakespeare by characters:
# python prepare.py shakespeare_char && python train.py config/absorb.py
dataset = "shakespeare_char"
out_dir = "out/absorb"

n_layer, n_head, n_embd = 4, 3, 192
block_size = 128
batch_size = 32
max_steps = 1000
learning_rate = 1.2e-2
warmup_steps = 100
decay_lr = "cosine"  # the tables in assets/experiments were made with it
eval_interval = 100
eval_sequences = 96
eval_times = 4
save_interval = 100
log_interval = 50
