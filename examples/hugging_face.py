"""A model of transformers, converted and trained on a task it can learn in seconds: python examples/hugging_face.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import normops

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config)

# LlamaRMSNorm is not torch's RMSNorm. It is known, and compared with the kernel on random numbers before it is changed.
normops.convert(model)
print(normops.summary(model))

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(40):
    # Sequences that count upwards, modulo 32: after the first token everything is known.
    tokens = (torch.randint(32, (16, 1)) + torch.arange(24)) % 32
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# What is saved holds nothing of normops, and neither does the model once it is turned back.
normops.revert(model)
print(f"loss at the end {loss.item():.3f}, layers are {type(model.model.norm).__name__} again")
