# SEDD small on OpenWebText, as published: 12 layers, batches of 512 sequences of 1024 tokens.
# torchrun --nproc_per_node=8 train.py config/owt.py
dataset = "owt"
out_dir = "out/owt"
init_from = "auto"  # the same command starts the training and, after a stop, goes on with it

n_layer, n_head, n_embd, cond_dim = 12, 12, 768, 128
block_size = 1024
dropout = 0.1

times = "uniform"
batch_size = 512  # over all processes: 8 GPUs take 64 sequences each, in 2 micro-batches
micro_batch_size = 32
max_steps = 1_300_000
optimizer = "adamw"
learning_rate = 3e-4
beta2 = 0.999
warmup_steps = 2500
decay_lr = "none"
grad_clip = 1.0
ema = 0.9999

eval_interval = 10_000
eval_sequences = 256
save_interval = 5_000
