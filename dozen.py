import time; T=time.time()
import torch
from sedd import SEDD, SEDDConfig, diffusion_loss, sample

text = torch.frombuffer(bytearray(open("sedd.py", "rb").read()), dtype=torch.uint8).long()  # tokens are bytes
model = SEDD(SEDDConfig(vocab_size=256, n_layer=2, n_head=2, n_embd=64, dropout=0.0))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(300):
    x0 = torch.stack([text[i : i + 64] for i in torch.randint(len(text) - 64, (32,))])  # 32 pieces of 64 bytes
    loss = diffusion_loss(model, model.graph, model.noise, x0).mean() / 64  # nats per byte: from 5.5 to about 3
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step%50==49 or step==0: print(step, loss.item())
print(bytes(sample(model, model.graph, model.noise, torch.full((1, 64), -1), steps=64)[0].tolist()))  # -1: to write

print(time.time()-T)
