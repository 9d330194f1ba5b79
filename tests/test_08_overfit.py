"""One batch can be learnt by heart: gradients arrive everywhere, and the targets are the right ones."""
import torch

from train_gpt2 import GPT, GPTConfig


def test_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    tokens = torch.randint(64, (4, 17))
    x, y = tokens[:, :-1], tokens[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    assert loss < 0.05
    assert (model(x).argmax(dim=-1) == y).float().mean() > 0.99  # and it is the next token that it says
