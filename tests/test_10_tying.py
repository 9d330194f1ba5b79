"""One matrix reads the tokens and writes them."""
import torch
from torch.func import functional_call

from common import randomise
from train_gpt2 import GPT, GPTConfig, SIZES, num_params

CONFIG = GPTConfig(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=8)


def test_head_and_embedding_are_one_parameter_also_after_loading():
    model = GPT(CONFIG)
    model.load_state_dict(randomise(GPT(CONFIG)).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name, p in model.named_parameters() if p.shape == (64, 8)] == ["transformer.wte.weight"]


def test_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES["gpt2"]))
    no_token = (50304 - 50257) * 768
    assert num_params(model) == sum(p.numel() for _, p in model.named_parameters()) - no_token == 124_439_808


def test_the_gradient_is_the_sum_of_both_uses():
    model = randomise(GPT(CONFIG)).double()
    x, y = torch.randint(19, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    model(x, y).backward()

    untied = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters(remove_duplicate=False)}
    read, write = untied["transformer.wte.weight"], untied["lm_head.weight"]
    assert read is not write
    functional_call(model, untied, (x, y), tie_weights=False).backward()
    assert read.grad.abs().max() > 1e-3 and write.grad.abs().max() > 1e-3
    torch.testing.assert_close(model.lm_head.weight.grad, read.grad + write.grad)
